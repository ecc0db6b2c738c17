"""Random ground truth and detections, and rows written by hand, for the tests of what is counted from matches."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hdovd.data import Protocol
from hdovd.evaluation.matching import Found, Objects

PROTOCOL = Protocol("mine", ("cat", "dog", "bus"), ("ant", "zebra"))
CAT, DOG, BUS, ANT, ZEBRA = range(5)
Box = tuple[float, float, float, float]


def objects_of(*rows: tuple[int, int, Box] | tuple[int, int, Box, bool]) -> Objects:
    """From (image id, label, box[, crowd])."""
    return Objects(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[1] for row in rows], np.int64),
        np.array([len(row) > 3 and row[3] for row in rows], bool),
    )


def found_of(*rows: tuple[int, int, Box, float]) -> Found:
    """From (image id, label, box, score)."""
    return Found(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[3] for row in rows], np.float64),
    )


def random_scene(
    seed: int, *, images: int = 20, crowds: float = 0.15, without: int | None = None
) -> tuple[Found, Objects]:
    """Crowded images with ids out of order, equal scores, equal boxes, crowds, and a class without objects if asked
    for.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(1000)[:images]

    def boxes(count: int) -> np.ndarray:
        return np.concatenate([rng.uniform(0, 80, (count, 2)), rng.uniform(10, 50, (count, 2))], axis=1)

    total, most = images * 6, images * 12
    labels = rng.integers(0, 5, total)
    if without is not None:
        labels[labels == without] = (without + 1) % 5
    owner, box = rng.integers(0, images - 1, total), boxes(total)  # the last image has none
    objects = Objects(ids[owner], box, labels, rng.random(total) < crowds)
    of, near = rng.integers(0, total, most), rng.random(most) < 0.7
    around = box[of] + rng.normal(0, 4, (most, 4)) * (rng.random(most) < 0.9)[:, None]
    where = np.where(near[:, None], around, boxes(most))
    where[:, 2:] = np.maximum(where[:, 2:], 1)
    return Found(
        np.where(near, objects.image_ids[of], rng.choice(ids, most)),
        where,
        np.where(near & (rng.random(most) < 0.6), labels[of], rng.integers(0, 5, most)),
        rng.random(most).round(2),
    ), objects


def cocoeval(found: Found, objects: Objects, max_detections: int = 1000) -> dict[str, Any]:
    """What COCOeval accumulates: `precision` and `scores` (IoU, recall, class, area, maxDets)."""
    images = sorted({*found.image_ids.tolist(), *objects.image_ids.tolist()})
    header = {"images": [{"id": i} for i in images], "categories": [{"id": k} for k in range(5)]}
    truth = [{**row, "iscrowd": int(crowd)} for row, crowd in zip(_rows(objects), objects.crowd.tolist(), strict=True)]
    dets = [
        {**row, "iscrowd": 0, "score": score} for row, score in zip(_rows(found), found.scores.tolist(), strict=True)
    ]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (truth, dets):
            side = COCO()
            side.dataset = {**header, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.params.maxDets = [1, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return dict(evaluation.eval)


def _rows(of: Found | Objects) -> list[dict[str, Any]]:
    columns = (part.tolist() for part in (of.image_ids, of.boxes, of.labels))
    return [
        {"id": number, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3]}
        for number, (image, box, label) in enumerate(zip(*columns, strict=True), start=1)
    ]
