"""OV-COCO AP through pycocotools or an engine that gives the same (METHOD section 1).

One COCOeval run over all classes of the protocol; novel, base and all are means over slices of its classes.
All values are in percent.
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import clip_box, read_instances
from hdovd.data.protocol import Protocol
from hdovd.evaluation.engines import Engine, classes
from hdovd.evaluation.groups import GROUPS, group_mean
from hdovd.evaluation.matching import Objects


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """Per class AP50 and AP (IoU 0.5:0.95) in label order; NaN for a class without ground truth."""

    protocol: Protocol
    ap50: np.ndarray
    ap: np.ndarray

    def summary(self) -> dict[str, dict[str, float | None]]:
        """`{"ap50": {"novel", "base", "all"}, "ap": {...}}`."""
        return {
            name: {group: group_mean(values, self.protocol, group) for group in GROUPS}
            for name, values in (("ap50", self.ap50), ("ap", self.ap))
        }

    def without_ground_truth(self) -> list[str]:
        return [name for name, value in zip(self.protocol.names, self.ap50, strict=True) if np.isnan(value)]

    def check_weighted_mean(self) -> None:
        """`all` is the class-weighted mean of base and novel when every class has ground truth."""
        base, novel = len(self.protocol.base), len(self.protocol.novel)
        for parts in self.summary().values():
            weighted = (base * (parts["base"] or 0.0) + novel * (parts["novel"] or 0.0)) / (base + novel)
            if novel and not self.without_ground_truth() and abs((parts["all"] or 0.0) - weighted) > 1e-6:
                raise AssertionError(f"AP of all {parts['all']} is not the weighted mean of base and novel {weighted}")

    def per_class(self) -> dict[str, dict[str, float | None]]:
        return {
            name: {"ap50": None, "ap": None} if np.isnan(ap50) else {"ap50": ap50, "ap": ap}
            for name, ap50, ap in zip(self.protocol.names, self.ap50.tolist(), self.ap.tolist(), strict=True)
        }


class GroundTruth:
    """The objects of an annotation file that AP counts, read and indexed once: they serve one set of detections after
    another.

    `objects`: the same as arrays, in the file's order.
    """

    def __init__(
        self,
        annotations: Path,
        coco_ids: tuple[int, ...],
        image_ids: Iterable[int],
        protocol: Protocol,
        engine: str = Engine.PYCOCOTOOLS,
    ) -> None:
        """`coco_ids`: the file's category id of every class, in label order. Raises HdovdError without the file or the
        engine.
        """
        self.protocol, self.coco_ids = protocol, coco_ids
        self._coco, self._evaluation = classes(engine)
        self._image_ids, label = set(image_ids), {coco_id: k for k, coco_id in enumerate(coco_ids)}
        found = read_instances(annotations)
        boxes = np.array(found.boxes).reshape(-1, 4)
        kept = [
            row
            for row, (image_id, category) in enumerate(zip(found.image_ids, found.categories, strict=True))
            if image_id in self._image_ids
            and category in label
            and row not in found.odd
            and clip_box(boxes[row].tolist(), *found.images[image_id][1:])[0] is not None
        ]  # what `load_split` skipped is no object
        self.objects = Objects(
            np.array(found.image_ids, np.int64)[kept],
            boxes[kept],
            np.array([label[found.categories[row]] for row in kept], np.int64),
            np.array(found.crowd, bool)[kept],
        )
        areas = np.array(found.areas)
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas).tolist()
        # pycocotools takes annotation id 0 for "unmatched": number them anew from 1
        self._truth = self._indexed(
            [
                {
                    "id": number,
                    "image_id": found.image_ids[row],
                    "category_id": found.categories[row],
                    "bbox": boxes[row].tolist(),
                    "iscrowd": found.crowd[row],
                    "area": areas[row],
                }
                for number, row in enumerate(kept, start=1)
            ]
        )

    def average_precision(self, detections: list[dict[str, Any]]) -> AveragePrecision:
        """AP of COCO results.

        Args:
            detections: `[{image_id, category_id, bbox: [x, y, w, h], score}]`, pixels of the original images; any
            order.

        Raises HdovdError if one is for an image that is not in the truth.
        """
        strange = {d["image_id"] for d in detections} - self._image_ids
        if strange:
            raise HdovdError(
                f"detections for images that the ground truth does not hold: {shorten(sorted(strange))}; "
                "were they made for another split?"
            )
        found = self._indexed(
            [
                {
                    "id": number,
                    "image_id": d["image_id"],
                    "category_id": d["category_id"],
                    "bbox": d["bbox"],
                    "score": d["score"],
                    "area": d["bbox"][2] * d["bbox"][3],
                    "iscrowd": 0,
                }
                for number, d in enumerate(detections, start=1)
            ]
        )
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            evaluation = self._evaluation(self._truth, found, "bbox")
            evaluation.params.imgIds = sorted(self._image_ids)
            evaluation.params.catIds = list(self.coco_ids)
            evaluation.params.maxDets = [
                max(self.protocol.max_detections)
            ]  # AP is read at the largest; the others would cost their time
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()
        # IoU x recall x class, -1 where there is no ground truth; COCOeval sorts the classes by category id
        place = {coco_id: k for k, coco_id in enumerate(evaluation.params.catIds)}
        precision = evaluation.eval["precision"][:, :, [place[coco_id] for coco_id in self.coco_ids], 0, -1]
        precision = np.where(precision < 0, np.nan, precision)
        return AveragePrecision(self.protocol, precision[0].mean(axis=0) * 100, precision.mean(axis=(0, 1)) * 100)

    def _indexed(self, annotations: list[dict[str, Any]]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            coco = self._coco()
            coco.dataset = {
                "info": {},
                "images": [{"id": i} for i in sorted(self._image_ids)],
                "annotations": annotations,
                "categories": [
                    {"id": i, "name": name} for i, name in zip(self.coco_ids, self.protocol.names, strict=True)
                ],
            }
            coco.createIndex()
        return coco
