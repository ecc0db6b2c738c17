"""Average recall: by hand, and against pycocotools with useCats = 0."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hdovd.evaluation.matching import NEVER, THRESHOLDS, box_ious, found_at, recall

OBJECTS = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)


def test_each_box_finds_one_object_and_each_object_is_found_once() -> None:
    boxes = np.array(
        [[0, 0, 10, 9], [0, 0, 10, 10], [21, 0, 30, 10], [50, 50, 60, 60]], np.float32
    )  # IoU 0.9, 1.0, 0.9, 0
    assert found_at(boxes, OBJECTS, [0.5, 0.95]).tolist() == [[0, 2], [1, NEVER]]
    found = [found_at(boxes, OBJECTS, [0.5, 0.95])]
    assert recall(found, 1).tolist() == [0.5, 0.0]
    assert recall(found, 2).tolist() == [0.5, 0.5]
    assert recall(found, 3).tolist() == [1.0, 0.5]


def test_nothing_proposed_and_nothing_to_find() -> None:
    none = np.zeros((0, 4), np.float32)
    assert recall([found_at(none, OBJECTS)], 10).tolist() == [0.0] * 10
    assert found_at(OBJECTS, none).shape == (10, 0)
    assert np.isnan(recall([found_at(OBJECTS, none)], 10)).all()


def test_ious() -> None:
    assert box_ious(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).tolist() == [
        [pytest.approx(1 / 3), 0.0]
    ]


def crowded_world(seed: int, images: int = 30) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Objects that overlap each other, and proposals near them, many a time the same object: who takes which
    matters."""
    rng, truth, proposals = np.random.default_rng(seed), [], []
    for _ in range(images):
        low = rng.integers(0, 40, (int(rng.integers(0, 7)), 2))
        objects = np.concatenate([low, low + rng.integers(15, 50, low.shape)], axis=1).astype(np.float32)
        near = np.repeat(objects, 6, axis=0) + rng.integers(
            -6, 7, (6 * len(objects), 4)
        )  # whole numbers: equal overlaps occur
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        truth.append(objects)
        proposals.append(rng.permutation(near).astype(np.float32))
    return truth, proposals


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(seed: int) -> None:
    truth, proposals = crowded_world(seed)
    ids, most = list(range(1, len(truth) + 1)), (1, 3, 10, 30)

    def entries(boxes: list[np.ndarray], scored: bool) -> list[dict[str, object]]:
        rows = [(i, place, row.tolist()) for i, own in zip(ids, boxes, strict=True) for place, row in enumerate(own)]
        return [
            {
                "id": n,
                "image_id": i,
                "category_id": n % 3 + 1,
                "bbox": [a, b, c - a, d - b],
                "area": (c - a) * (d - b),
                "iscrowd": 0,
            }
            | ({"score": 1 / (1 + place)} if scored else {})
            for n, (i, place, (a, b, c, d)) in enumerate(rows, start=1)
        ]

    def coco(annotations: list[dict[str, object]]) -> COCO:
        made = COCO()
        made.dataset = {
            "images": [{"id": i} for i in ids],
            "annotations": annotations,
            "categories": [{"id": k} for k in (1, 2, 3)],
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(coco(entries(truth, False)), coco(entries(proposals, True)), "bbox")
        judge.params.useCats, judge.params.maxDets = 0, list(most)
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    expected = judge.eval["recall"][:, 0, 0, :]
    assert 0.2 < expected[0, 2] < expected[0, 3]
    assert tuple(judge.params.iouThrs) == THRESHOLDS
    found = [found_at(boxes, objects) for boxes, objects in zip(proposals, truth, strict=True)]
    for column, k in enumerate(most):
        np.testing.assert_allclose(recall(found, k), expected[:, column], atol=1e-12)
