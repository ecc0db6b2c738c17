"""OV-COCO AP through pycocotools (METHOD section 1).

One COCOeval run over all classes of the protocol; novel, base and all are means over slices of its classes.
All values are in percent.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hdovd.coco import clip_box, read_json
from hdovd.protocol import Protocol

GROUPS = ("novel", "base", "all")


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """Per class AP50 and AP (IoU 0.5:0.95) in label order; NaN for a class without ground truth."""

    protocol: Protocol
    ap50: np.ndarray
    ap: np.ndarray

    def _group(self, group: str) -> slice:
        base = len(self.protocol.base)
        return {"novel": slice(base, None), "base": slice(0, base), "all": slice(None)}[group]

    def mean(self, values: np.ndarray, group: str) -> float | None:
        """Mean over the classes of a group that have ground truth; None if none has."""
        counted = values[self._group(group)]
        counted = counted[~np.isnan(counted)]
        return float(counted.mean()) if len(counted) else None

    def summary(self) -> dict[str, dict[str, float | None]]:
        """`{"ap50": {"novel", "base", "all"}, "ap": {...}}`."""
        return {name: {group: self.mean(values, group) for group in GROUPS} for name, values in (("ap50", self.ap50), ("ap", self.ap))}

    def without_ground_truth(self) -> list[str]:
        return [name for name, value in zip(self.protocol.names, self.ap50, strict=True) if np.isnan(value)]

    def check_weighted_mean(self) -> None:
        """`all` is the class-weighted mean of base and novel when every class has ground truth."""
        if self.without_ground_truth() or not self.protocol.novel:
            return
        base, novel = len(self.protocol.base), len(self.protocol.novel)
        for values in (self.ap50, self.ap):
            parts = {g: self.mean(values, g) or 0.0 for g in GROUPS}
            weighted = (base * parts["base"] + novel * parts["novel"]) / (base + novel)
            if abs(parts["all"] - weighted) > 1e-6:
                raise AssertionError(f"AP of all {parts['all']} is not the weighted mean of base and novel {weighted}")

    def per_class(self) -> dict[str, dict[str, float | None]]:
        return {name: {"ap50": _number(a), "ap": _number(b)}
                for name, a, b in zip(self.protocol.names, self.ap50, self.ap, strict=True)}


def average_precision(annotations: Path, coco_ids: tuple[int, ...], image_ids: Iterable[int], detections: list[dict[str, Any]],
                      protocol: Protocol) -> AveragePrecision:
    """AP of COCO results on `image_ids` of an annotation file.

    Args:
        coco_ids: the file's category id of every class, in label order.
        detections: `[{image_id, category_id, bbox: [x, y, w, h], score}]`, pixels of the original images.
    """
    wanted_images, wanted_classes = set(image_ids), set(coco_ids)
    tree = read_json(annotations, "annotations")
    size = {i["id"]: (i["width"], i["height"]) for i in tree["images"]}
    kept = [a for a in tree["annotations"] if a["image_id"] in wanted_images and a["category_id"] in wanted_classes
            and clip_box(a["bbox"], *size[a["image_id"]])[0] is not None]  # what `load_split` skipped is no object
    # pycocotools takes annotation id 0 for "unmatched": number them anew from 1
    truth = [{**a, "id": number, "iscrowd": a.get("iscrowd", 0), "area": a.get("area", a["bbox"][2] * a["bbox"][3])}
             for number, a in enumerate(kept, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, "images": [i for i in tree["images"] if i["id"] in wanted_images], "annotations": truth,
                        "categories": [c for c in tree["categories"] if c["id"] in wanted_classes]}
        coco.createIndex()
        found = coco.loadRes([dict(d) for d in detections]) if detections else COCO()
        if not detections:
            found.dataset = {"images": coco.dataset["images"], "annotations": [], "categories": coco.dataset["categories"]}
            found.createIndex()
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.imgIds = sorted(wanted_images)
        evaluation.params.catIds = list(coco_ids)
        evaluation.params.maxDets = list(protocol.max_detections)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # IoU x recall x class, -1 where there is no ground truth; COCOeval sorts the classes by category id
    place = {coco_id: k for k, coco_id in enumerate(evaluation.params.catIds)}
    precision = evaluation.eval["precision"][:, :, [place[coco_id] for coco_id in coco_ids], 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    return AveragePrecision(protocol, precision[0].mean(axis=0) * 100, precision.mean(axis=(0, 1)) * 100)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
