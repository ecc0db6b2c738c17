"""What became of every detection and every object of one image: for a gallery. Made by `run_analysis`.

Boxes are xyxy, pixels of the original image.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from hdovd.data.coco import ImageBoxes
from hdovd.evaluation.matching import Found, Matching, Objects, paired_ious
from hdovd.evaluation.tide import KINDS, Errors, Kind

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
        """The fields as JSON values; kinds and fates by name, boxes to a hundredth of a pixel, scores and IoU to five digits."""
        return {"image_id": self.image_id, "file_name": self.file_name, "width": self.width, "height": self.height,
                "detections": [{"box": [round(v, 2) for v in d.box], "label": d.label, "score": round(d.score, 5), "kind": d.kind.value,
                                "truth": d.truth, "iou": round(d.iou, 5)} for d in self.detections],
                "truths": [{"box": [round(v, 2) for v in t.box], "label": t.label, "annotation_id": t.annotation_id, "fate": t.fate.value,
                            "detection": t.detection} for t in self.truths]}


def verdicts_on(image: ImageBoxes, found: Found, objects: Objects, matching: Matching, errors: Errors) -> ImageVerdicts:
    """What became of an image's detections and objects; `objects` holds those of the image in its order."""
    mine = np.flatnonzero(found.image_ids == image.id)
    mine = mine[np.argsort(-found.scores[mine], kind="stable")]
    truths = np.flatnonzero(objects.image_ids == image.id)
    about = errors.item[mine]
    has = about >= 0
    ious = np.zeros(len(mine))
    ious[has] = paired_ious(found.boxes[mine[has]], objects.boxes[about[has]], objects.crowd[about[has]])
    place = {item: k for k, item in enumerate(truths.tolist())}
    detections = [DetectionVerdict(box, label, score, KINDS[kind], place.get(item), iou) for box, label, score, kind, item, iou in zip(
        _corners(found.boxes[mine]), found.labels[mine].tolist(), found.scores[mine].tolist(), errors.kind[mine].tolist(), about.tolist(),
        ious.tolist(), strict=True)]
    shown = {detection: k for k, detection in enumerate(mine.tolist())}
    fates: list[tuple[Fate, int | None]] = []
    for item, finder, mender in zip(truths.tolist(), matching.finder[truths].tolist(), errors.mended_by[truths].tolist(), strict=True):
        if finder >= 0:
            fates.append((Fate.FOUND, shown[finder]))
        elif mender >= 0:
            fates.append((Fate.MISNAMED if KINDS[errors.kind[mender]] is Kind.CLASSIFICATION else Fate.MISPLACED, shown[mender]))
        else:
            fates.append((Fate.CROWD if objects.crowd[item] else Fate.MISSED, None))
    return ImageVerdicts(image.id, image.file_name, image.width, image.height, detections, [
        TruthVerdict(box, label, number, *fate) for box, label, number, fate in zip(
            _corners(objects.boxes[truths]), objects.labels[truths].tolist(), image.annotation_ids.tolist(), fates, strict=True)])


def _corners(boxes: np.ndarray) -> list[Box]:
    return [(x, y, x + w, y + h) for x, y, w, h in boxes.tolist()]
