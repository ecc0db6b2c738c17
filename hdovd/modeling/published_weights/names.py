"""The authors' names for the weights of their detectors, and ours. Called by `pipelines.import_checkpoint`.

Their code stands on mmdetection; the shapes are the same but for a leading 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hdovd.modeling.published_weights import adamixer


@dataclass(frozen=True, slots=True)
class Published:
    """How one detector of the authors' becomes one of ours.

    recipe, settings: what it is here. own_name: our name of a tensor of theirs, None for one that is not of this detector.
    unneeded: pattern of their names -> why hdovd does without. anew: pattern of our names -> why their checkpoint has none of it.
    background: their name of the background embedding, whose last side is D.
    """

    recipe: str
    settings: tuple[str, ...]
    own_name: Callable[[str], str | None]
    unneeded: dict[str, str]
    anew: dict[str, str]
    background: str = "roi_head.bg_embedding.weight"


_FASTER_RCNN = (  # in order: theirs as a pattern, ours
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)", r"head.fc1.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)", r"head.fc2.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(.+)", r"head.class_feature.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(.+)", r"head.deltas.\1"),
    (r"roi_head\.fc\.(.+)", r"head.distillation.\1"),
    (r"roi_head\.bg_embedding\.weight", r"background"),
    (r"roi_head\.layernorm\.(.+)", r"image_level.head.norm.\1"),
    (r"roi_head\.linear_transform\.(.+)", r"image_level.head.project.\1"),
)


def faster_rcnn_name(name: str) -> str | None:
    """Our name of a tensor of their Faster R-CNN, or None."""
    for pattern, own in _FASTER_RCNN:
        if found := re.fullmatch(pattern, name):
            return found.expand(own)
    return None


PUBLISHED = {
    "faster_rcnn": Published(
        "ov-coco-faster-rcnn-r50",
        ("detector.rpn.rules=authors",),
        faster_rcnn_name,
        {r".*num_batches_tracked": "frozen batch norms count no batches"},
        {r".*_queue\.rows": "memories of the alignment losses, which begin empty"}),
    "adamixer": Published("ov-coco-adamixer-r50", (), adamixer.own_name, {}, adamixer.NOT_PUBLISHED),
}
