"""Confusion counts by hand."""

from __future__ import annotations

import json
from typing import Any

import matching_scenes as scenes
import numpy as np
from matching_scenes import ANT, BUS, CAT, DOG, PROTOCOL

from hdovd.evaluation.matching import Confusion, Found, Objects, confusion, find_overlaps

BACKGROUND = MISSED = 5
WHOLE = (0.0, 0.0, 10.0, 10.0)


def counted(found: Found, objects: Objects, threshold: float = 0.3) -> Confusion:
    return confusion(found, objects, find_overlaps(found, objects), PROTOCOL, threshold)


def cells(of: Confusion) -> dict[tuple[int, int], int]:
    rows, columns = np.nonzero(of.counts)
    return {(t, d): int(of.counts[t, d]) for t, d in zip(rows.tolist(), columns.tolist(), strict=True)}


def test_each_cell() -> None:
    objects = scenes.objects_of((1, CAT, WHOLE), (2, CAT, WHOLE), (3, ANT, WHOLE), (4, DOG, WHOLE))
    found = scenes.found_of(
        (1, CAT, WHOLE, 0.9),
        (2, DOG, WHOLE, 0.3),
        (3, ANT, WHOLE, 0.29),
        (4, DOG, (0, 0, 10, 4.9), 0.9),
        (5, BUS, WHOLE, 0.5),
    )
    assert cells(counted(found, objects)) == {
        (CAT, CAT): 1,
        (CAT, DOG): 1,
        (ANT, MISSED): 1,
        (DOG, MISSED): 1,
        (BACKGROUND, DOG): 1,
        (BACKGROUND, BUS): 1,
    }


def test_the_best_scored_takes_the_object_whatever_its_class() -> None:
    objects = scenes.objects_of((1, CAT, WHOLE))
    found = scenes.found_of((1, CAT, WHOLE, 0.5), (1, DOG, (0, 0, 10, 8), 0.6))
    assert cells(counted(found, objects)) == {(CAT, DOG): 1, (BACKGROUND, CAT): 1}


def test_a_detection_takes_what_it_overlaps_most_and_of_equals_its_own_class() -> None:
    most = scenes.objects_of((1, CAT, (0, 0, 10, 8)), (1, DOG, WHOLE))
    assert cells(counted(scenes.found_of((1, CAT, WHOLE, 0.5)), most)) == {(DOG, CAT): 1, (CAT, MISSED): 1}
    for first, second in ((CAT, DOG), (DOG, CAT)):
        equal = scenes.objects_of((1, first, WHOLE), (1, second, WHOLE))
        assert cells(counted(scenes.found_of((1, CAT, WHOLE, 0.5), (1, DOG, WHOLE, 0.4)), equal)) == {
            (CAT, CAT): 1,
            (DOG, DOG): 1,
        }


def test_a_crowd_excuses_its_own_class_alone_and_is_not_missed() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 100, 100), True))
    found = scenes.found_of((1, CAT, WHOLE, 0.5), (1, CAT, WHOLE, 0.4), (1, DOG, WHOLE, 0.5))
    assert cells(counted(found, objects)) == {(BACKGROUND, DOG): 1}


def test_rows_sum_to_the_objects_and_columns_to_the_detections() -> None:
    found, objects = scenes.random_scene(3, crowds=0)
    of = counted(found, objects, 0.25)
    assert of.counts.sum(axis=1)[:-1].tolist() == np.bincount(objects.labels, minlength=5).tolist()
    assert of.counts.sum(axis=0)[:-1].tolist() == np.bincount(found.labels[found.scores >= 0.25], minlength=5).tolist()
    assert of.counts[-1, -1] == 0
    assert (of.counts[[0, 1, 2, 3, 4, -1], :-1].sum(axis=1) > 0).all()
    assert len(of.top(50)) > 8


def test_the_commonest_confusions_are_told_with_groups() -> None:
    objects = scenes.objects_of(*((i, ANT, WHOLE) for i in range(4)), (4, CAT, WHOLE), (5, CAT, WHOLE), (6, DOG, WHOLE))
    found = scenes.found_of(
        (0, CAT, WHOLE, 0.9),
        (1, CAT, WHOLE, 0.9),
        (2, BUS, WHOLE, 0.9),
        (3, ANT, WHOLE, 0.9),
        (4, ANT, WHOLE, 0.9),
        (8, ANT, WHOLE, 0.9),
    )
    of = counted(found, objects)
    top = [
        _pair("ant", "novel", "cat", "base", 2, 0.5),
        _pair("cat", "base", "ant", "novel", 1, 0.5),
        _pair("ant", "novel", "bus", "base", 1, 0.25),
    ]
    assert of.top() == top
    assert of.top(1) == top[:1]
    tree = json.loads(json.dumps(of.to_tree(), allow_nan=False))
    assert tree["rows"][-1] == "background"
    assert tree["columns"][-1] == "missed"
    assert tree["counts"][ANT] == [2, 0, 1, 1, 0, 0]
    assert tree["top"] == top


def _pair(truth: str, truth_group: str, named: str, named_group: str, count: int, share: float) -> dict[str, Any]:
    return {
        "truth": truth,
        "truth_group": truth_group,
        "named": named,
        "named_group": named_group,
        "count": count,
        "share": share,
    }


def test_nothing_at_all() -> None:
    of = counted(scenes.found_of(), scenes.objects_of())
    assert of.counts.sum() == 0
    assert of.top() == []
