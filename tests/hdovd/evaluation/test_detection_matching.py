"""Matching: COCOeval's on random crowded scenes, and its rules one by one."""

from __future__ import annotations

import matching_scenes as scenes
import numpy as np
import pytest
from matching_scenes import ANT, CAT, DOG, PROTOCOL

from hdovd.evaluation import matching as detection_matching
from hdovd.evaluation.matching import Found, Matching, Objects, Verdict, find_overlaps, match, precision_curves


def matched(found: Found, objects: Objects, most: int = 1000) -> Matching:
    return match(found, objects, find_overlaps(found, objects), most)


@pytest.mark.parametrize("most", [1000, 2])
@pytest.mark.parametrize("seed", range(6))
def test_ap50_and_curves_are_those_of_cocoeval(seed: int, most: int) -> None:
    found, objects = scenes.random_scene(seed, without=ANT if seed == 0 else None)
    counted = scenes.cocoeval(found, objects, most)
    matching = matched(found, objects, most)
    curves = precision_curves(found, objects, matching, PROTOCOL)
    precision, scores = (counted[name][0, :, :, 0, -1].T for name in ("precision", "scores"))
    there = precision[:, 0] >= 0
    assert there.sum() == (4 if seed == 0 else 5)
    np.testing.assert_array_equal(np.isnan(curves.precision[:, 0]), ~there)
    np.testing.assert_allclose(curves.precision[there], precision[there], atol=1e-9)
    np.testing.assert_array_equal(curves.scores[there], scores[there])
    np.testing.assert_allclose(curves.ap50()[there], precision[there].mean(axis=1) * 100, atol=1e-9)
    assert {Verdict.WRONG, Verdict.RIGHT, Verdict.IGNORED} == set(matching.verdict.tolist())  # else little was tested


def test_pairs_in_small_parts_are_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    found, objects = scenes.random_scene(1)
    whole = find_overlaps(found, objects)
    monkeypatch.setattr(detection_matching, "PAIRS_AT_ONCE", 7)
    parts = find_overlaps(found, objects)
    for name in ("detection", "item", "iou"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert len(whole.iou) > 400


def test_the_best_scored_detection_takes_the_object_and_an_equal_one_the_first_listed() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 10, 10)))
    found = scenes.found_of((1, CAT, (0, 0, 10, 10), 0.5), (1, CAT, (0, 0, 10, 6), 0.9), (1, CAT, (0, 0, 10, 10), 0.9))
    matching = matched(found, objects)
    assert matching.verdict.tolist() == [Verdict.WRONG, Verdict.RIGHT, Verdict.WRONG]
    assert (matching.item.tolist(), matching.finder.tolist()) == ([-1, 0, -1], [1])


def test_of_objects_overlapped_alike_the_last_is_taken_and_then_the_other() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 10, 10)), (1, CAT, (0, 0, 10, 10)))
    found = scenes.found_of((1, CAT, (0, 0, 10, 9), 0.5), (1, CAT, (0, 0, 10, 8), 0.9))
    assert matched(found, objects).item.tolist() == [0, 1]


def test_half_an_overlap_is_enough_in_the_same_class_and_image_alone() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 10, 10)), (2, DOG, (0, 0, 10, 10)))
    found = scenes.found_of((1, CAT, (0, 0, 10, 5), 0.9), (2, CAT, (0, 0, 10, 10), 0.8), (3, DOG, (0, 0, 10, 10), 0.7))
    matching = matched(found, objects)
    assert matching.verdict.tolist() == [Verdict.RIGHT, Verdict.WRONG, Verdict.WRONG]
    assert matching.finder.tolist() == [0, -1]


def test_a_crowd_excuses_every_detection_in_it_but_is_not_preferred_to_an_object_and_never_found() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 100, 100), True), (1, CAT, (0, 0, 10, 10)))
    found = scenes.found_of(
        (1, CAT, (0, 0, 10, 10), 0.9),
        (1, CAT, (40, 40, 10, 10), 0.8),
        (1, CAT, (95, 0, 10, 10), 0.7),
        (1, CAT, (96, 0, 10, 10), 0.6),
        (1, DOG, (40, 40, 10, 10), 0.5),
    )
    matching = matched(found, objects)
    assert matching.verdict.tolist() == [Verdict.RIGHT, Verdict.IGNORED, Verdict.IGNORED, Verdict.WRONG, Verdict.WRONG]
    assert matching.item.tolist() == [1, 0, 0, -1, -1]
    assert matching.finder.tolist() == [-1, 0]


def test_detections_beyond_the_cap_of_their_class_and_image_are_ignored() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 10, 10)))
    found = scenes.found_of(
        (1, CAT, (0, 0, 10, 10), 0.1),
        (1, CAT, (50, 0, 10, 10), 0.9),
        (1, CAT, (70, 0, 10, 10), 0.8),
        (1, DOG, (0, 0, 10, 10), 0.05),
        (2, CAT, (0, 0, 10, 10), 0.05),
    )
    assert matched(found, objects, 2).verdict.tolist() == [Verdict.IGNORED, *[Verdict.WRONG] * 4]
    assert matched(found, objects, 3).verdict.tolist() == [Verdict.RIGHT, *[Verdict.WRONG] * 4]


@pytest.mark.parametrize("which", ["detections", "objects", "both"])
def test_nothing_on_one_side(which: str) -> None:
    objects = scenes.objects_of() if which != "detections" else scenes.objects_of((1, CAT, (0, 0, 10, 10)))
    found = scenes.found_of() if which != "objects" else scenes.found_of((1, CAT, (0, 0, 10, 10), 0.5))
    matching = matched(found, objects)
    assert matching.verdict.tolist() == [Verdict.WRONG] * len(found.labels)
    assert matching.finder.tolist() == [-1] * len(objects.labels)
    precision = precision_curves(found, objects, matching, PROTOCOL).precision
    assert np.isnan(precision).all() if which != "detections" else precision[CAT].sum() == 0


def test_a_box_without_area_overlaps_nothing() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 10, 10)), (1, CAT, (0, 0, 50, 50), True))
    assert matched(scenes.found_of((1, CAT, (2, 2, 0, 4), 0.5)), objects).verdict.tolist() == [Verdict.WRONG]
