"""What became of every detection and every object of one image: for a gallery. Made by `run_analysis`.

Boxes are xyxy, pixels of the original image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from hdovd.error_breakdown import Kind

Box = tuple[float, float, float, float]


class Fate(StrEnum):
    """Of an object: FOUND; MISNAMED and MISPLACED: not found, but a detection of another name stands at its place, or one of its name
    overlaps it too little; MISSED: none of these; CROWD: not counted."""

    FOUND = "found"
    MISNAMED = "misnamed"
    MISPLACED = "misplaced"
    MISSED = "missed"
    CROWD = "crowd"


@dataclass(frozen=True, slots=True)
class DetectionVerdict:
    """`truth`: the place among the image's truths of the object it found or, if it is an error, that the error is about; None if there is
    none. `iou` with it, 0 without one."""

    box: Box
    label: int
    score: float
    kind: Kind
    truth: int | None
    iou: float


@dataclass(frozen=True, slots=True)
class TruthVerdict:
    """`detection`: the place among the image's detections of the one that found it or, MISNAMED or MISPLACED, that failed to; else None."""

    box: Box
    label: int
    annotation_id: int
    fate: Fate
    detection: int | None


@dataclass(frozen=True, slots=True)
class ImageVerdicts:
    """`detections` best first, `truths` in the order of the annotation file. `file_name` is relative to the split's folder."""

    image_id: int
    file_name: str
    width: int
    height: int
    detections: list[DetectionVerdict]
    truths: list[TruthVerdict]

    def to_tree(self) -> dict[str, Any]:
        """The fields as JSON values; kinds and fates by name."""
        return asdict(self)
