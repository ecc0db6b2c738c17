"""AP through pycocotools or an engine that gives the same (METHOD section 1); novel, base, all and the protocol's own
groups are means over its classes. All values are in percent.

Federated annotations, LVIS's (arXiv 1908.03195), are counted by the same engines, with what LVIS's own package does
beforehand and afterwards done here: detections beyond the cap of an image, and those of classes that the image is not
judged by, are left out, and in an image whose objects of a class are not all annotated the whole image is a crowd of
that class, so that what finds none of them is ignored. They are counted class by class, over the images that have the
class: of 1,203 classes in 20,000 images COCOeval would keep 24 million entries, nearly all of them empty.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core import HdovdError, shorten
from hdovd.data import Instances, Protocol, group_mean, groups_of, read_instances
from hdovd.data.coco import federated_classes
from hdovd.evaluation import Engine, classes
from hdovd.evaluation.matching import Found, Judged, Objects, counted


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """Per class AP50 and AP (IoU 0.5:0.95) in label order; NaN for a class without ground truth."""

    protocol: Protocol
    ap50: np.ndarray
    ap: np.ndarray

    def summary(self) -> dict[str, dict[str, float | None]]:
        """`{"ap50": {"novel", "base", "all", and the protocol's own groups}, "ap": {...}}`."""
        return {
            name: {group: group_mean(values, self.protocol, group) for group in groups_of(self.protocol)}
            for name, values in (("ap50", self.ap50), ("ap", self.ap))
        }

    def without_ground_truth(self) -> list[str]:
        return [name for name, value in zip(self.protocol.names, self.ap50, strict=True) if np.isnan(value)]

    def per_class(self) -> dict[str, dict[str, float | None]]:
        return {
            name: {"ap50": None, "ap": None} if np.isnan(ap50) else {"ap50": ap50, "ap": ap}
            for name, ap50, ap in zip(self.protocol.names, self.ap50.tolist(), self.ap.tolist(), strict=True)
        }


ANYWHERE = (-1e7, -1e7, 2e7, 2e7)  # a box around whatever is detected, also beyond a picture's edges


def found_of(rows: Iterable[Mapping[str, Any]], coco_ids: tuple[int, ...]) -> Found:
    """Arrays of rows that are known to be sound. `coco_ids`: the category id of every class, in label order."""
    label = {coco_id: k for k, coco_id in enumerate(coco_ids)}
    columns = np.dtype([("image_ids", "q"), ("boxes", "d", 4), ("labels", "q"), ("scores", "d")])
    values = ((row["image_id"], tuple(row["bbox"]), label[row["category_id"]], row["score"]) for row in rows)
    table = np.fromiter(values, columns)  # not from a list: that of COCO val's takes hundreds of megabytes
    return Found(*(np.ascontiguousarray(table[name]) for name in ("image_ids", "boxes", "labels", "scores")))


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
        engine, and if a federated protocol's file does not say what its images are judged by.
        """
        self.protocol, self.coco_ids = protocol, coco_ids
        self._coco, self._evaluation = classes(engine)
        self._image_ids, label = set(image_ids), {coco_id: k for k, coco_id in enumerate(coco_ids)}
        found = read_instances(annotations)
        kept = [
            row
            for row, (image_id, kind) in enumerate(
                zip(found.image_ids.tolist(), found.categories.tolist(), strict=True)
            )
            if image_id in self._image_ids and kind in label and row not in found.odd
        ]  # what `load_split` skipped is no object
        labels = np.array([label[kind] for kind in found.categories[kept].tolist()], np.int64)
        self.objects = Objects(found.image_ids[kept], found.boxes[kept], labels, found.crowd[kept])
        areas = np.where(np.isnan(found.areas), found.boxes[:, 2] * found.boxes[:, 3], found.areas)[kept].tolist()
        if protocol.federated:
            self.objects = self._federated(found)
            areas += [0.0] * (len(self.objects.labels) - len(kept))
        columns = (self.objects.image_ids, self.objects.labels, self.objects.boxes, self.objects.crowd, np.array(areas))
        # pycocotools takes annotation id 0 for "unmatched": number them anew from 1
        self._truth = self._indexed(
            [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": coco_ids[label],
                    "bbox": box,
                    "iscrowd": int(crowd),
                    "area": area,
                }
                for number, (image_id, label, box, crowd, area) in enumerate(
                    zip(*(column.tolist() for column in columns), strict=True), start=1
                )
            ]
        )

    def _federated(self, found: Instances) -> Objects:
        """The objects with what the file says of its images: which classes are judged, and, of classes whose objects
        are not all annotated, a crowd that holds the whole image. Crowds come last.
        """
        ids, objects = np.array(sorted(self._image_ids), np.int64), self.objects
        judged, unfinished = federated_classes(found, ids.tolist(), self.coco_ids, self.protocol)
        judged[np.searchsorted(ids, objects.image_ids), objects.labels] = True
        rows, labels = np.nonzero(unfinished)
        return Objects(
            np.concatenate([objects.image_ids, ids[rows]]),
            np.concatenate([objects.boxes, np.tile(ANYWHERE, (len(rows), 1))]),
            np.concatenate([objects.labels, labels]),
            np.concatenate([objects.crowd, np.ones(len(rows), bool)]),
            Judged(ids, judged),
        )

    def average_precision(self, detections: list[dict[str, Any]]) -> AveragePrecision:
        """AP of COCO results.

        Args:
            detections: `[{image_id, category_id, bbox: [x, y, w, h], score}]`, pixels of the original images; any
            order.

        Raises HdovdError if one is for an image that is not in the truth.
        """
        if strange := {d["image_id"] for d in detections} - self._image_ids:
            raise HdovdError(
                f"detections for images that the ground truth does not hold: {shorten(sorted(strange))}; "
                "were they made for another split?"
            )
        if self.protocol.federated:
            within = counted(found_of(detections, self.coco_ids), self.objects, max(self.protocol.max_detections))
            detections = [detections[row] for row in np.flatnonzero(within).tolist()]
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
        parts = self._by_class(detections) if self.protocol.federated else [(sorted(self._image_ids), self.coco_ids)]
        precision = np.concatenate([self._precision(found, *part) for part in parts], axis=2)
        precision = np.where(precision < 0, np.nan, precision)
        return AveragePrecision(self.protocol, precision[0].mean(axis=0) * 100, precision.mean(axis=(0, 1)) * 100)

    def _by_class(self, detections: list[dict[str, Any]]) -> list[tuple[list[int], tuple[int, ...]]]:
        """The images with an object of a class or a detection of it, of each class; one at least: engines want one."""
        images: dict[int, set[int]] = {coco_id: set() for coco_id in self.coco_ids}
        for image_id, label in zip(self.objects.image_ids.tolist(), self.objects.labels.tolist(), strict=True):
            images[self.coco_ids[label]].add(image_id)
        for d in detections:
            images[d["category_id"]].add(d["image_id"])
        return [(sorted(own) or [min(self._image_ids)], (coco_id,)) for coco_id, own in images.items()]

    def _precision(self, found: Any, image_ids: list[int], coco_ids: Sequence[int]) -> np.ndarray:
        """COCOeval's precision of these images and classes, (IoU, recall, class): -1 without ground truth."""
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            evaluation = self._evaluation(self._truth, found, "bbox")
            evaluation.params.imgIds = image_ids
            evaluation.params.catIds = list(coco_ids)
            evaluation.params.maxDets = [
                max(self.protocol.max_detections)
            ]  # AP is read at the largest; the others would cost their time
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()
        # COCOeval sorts the classes by category id
        return np.asarray(evaluation.eval["precision"][:, :, np.argsort(np.argsort(coco_ids)), 0, -1])

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
