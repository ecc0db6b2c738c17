"""COCO files and protocols in, images with checked boxes and labels out, and what one image brings to a detector
(`targets`). Here stand the names that other rooms use of `coco` and `protocol`.
"""

from hdovd.data.coco import DataPaths, Exif, ImageBoxes, Instances, Skips, Split, load_split, read_instances
from hdovd.data.protocol import (
    GROUPS,
    METRICS,
    Protocol,
    group_labels,
    group_mean,
    group_of,
    groups_of,
    load_protocol,
    parse_protocol,
    shown_groups,
)

__all__ = [
    "GROUPS",
    "METRICS",
    "DataPaths",
    "Exif",
    "ImageBoxes",
    "Instances",
    "Protocol",
    "Skips",
    "Split",
    "group_labels",
    "group_mean",
    "group_of",
    "groups_of",
    "load_protocol",
    "load_split",
    "parse_protocol",
    "read_instances",
    "shown_groups",
]
