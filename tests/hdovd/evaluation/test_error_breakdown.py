"""TIDE's kinds and gains: cases made by hand, one of each kind and where kinds meet; gains against COCOeval on what was
mended.

A box (0, 0, 10, h) overlaps (0, 0, 10, 10) by h / 10.
"""

from __future__ import annotations

import json

import matching_scenes as scenes
import numpy as np
import pytest
from matching_scenes import ANT, BUS, CAT, DOG, PROTOCOL, ZEBRA

from hdovd.data import Protocol, group_labels
from hdovd.evaluation.matching import Found, Objects, Verdict, find_overlaps, match
from hdovd.evaluation.tide import ERRORS, ErrorBreakdown, Errors, Kind, break_down, classify
from hdovd.pipelines.evaluation.evaluate import error_table

WHOLE = (0.0, 0.0, 10.0, 10.0)
AWAY = (70.0, 70.0, 10.0, 10.0)
HALF = 100 * 50 / 101  # of AP50: what lies beyond recall 0.5


def kinds(found: Found, objects: Objects) -> tuple[list[Kind], Errors]:
    overlaps = find_overlaps(found, objects)
    errors = classify(found, objects, overlaps, match(found, objects, overlaps, 100))
    return [Kind(k) for k in errors.kind.tolist()], errors


def lower(height: float) -> scenes.Box:
    return (0.0, 0.0, 10.0, height)


@pytest.fixture
def one_of_each() -> tuple[Found, Objects]:
    objects = scenes.objects_of(
        (1, CAT, WHOLE),
        (2, DOG, WHOLE),
        (3, CAT, WHOLE),
        (4, DOG, WHOLE),
        (6, ANT, WHOLE),
        (7, CAT, WHOLE, True),
        (8, ANT, WHOLE),
    )
    found = scenes.found_of(
        (1, CAT, WHOLE, 0.9),
        (1, CAT, lower(8), 0.8),
        (2, CAT, WHOLE, 0.7),
        (3, CAT, lower(3), 0.6),
        (4, CAT, lower(3), 0.5),
        (5, CAT, WHOLE, 0.4),
        (7, CAT, lower(3), 0.95),
        (8, ANT, WHOLE, 0.2),
    )
    return found, objects


def test_one_of_each_kind(one_of_each: tuple[Found, Objects]) -> None:
    found, errors = kinds(*one_of_each)
    assert found == [
        Kind.RIGHT,
        Kind.DUPLICATE,
        Kind.CLASSIFICATION,
        Kind.LOCALISATION,
        Kind.BOTH,
        Kind.BACKGROUND,
        Kind.IGNORED,
        Kind.RIGHT,
    ]
    assert errors.item.tolist() == [0, 0, 1, 2, 3, -1, 5, 6]
    assert errors.mended_by.tolist() == [-1, 2, 3, -1, -1, -1, -1]
    assert np.flatnonzero(errors.missed).tolist() == [3, 4]  # "both" stands for nothing: its object is missed


def test_counts_and_gains_of_one_of_each(one_of_each: tuple[Found, Objects]) -> None:
    """Cats: right, then three wrong, then the mislocalised one; dogs: none of two found; ants: one of two."""
    broken = break_down(*one_of_each, PROTOCOL)
    base, novel, every = (broken.groups[group] for group in ("base", "novel", "all"))
    assert list(base.counts.values()) == [1, 1, 1, 1, 1, 1]
    assert list(novel.counts.values()) == [0, 0, 0, 0, 0, 1]
    assert list(every.counts.values()) == [1, 1, 1, 1, 1, 2]
    assert (base.objects, base.found, base.false_positives, base.false_negatives) == (4, 1, 5, 3)
    assert (novel.objects, novel.found, novel.false_positives, novel.false_negatives) == (2, 1, 0, 1)
    cat = {Kind.LOCALISATION: HALF * 2 / 4}  # the second of two cats at rank 4
    dog = {
        Kind.CLASSIFICATION: 100 - HALF,
        Kind.MISSED: 0.0,
    }  # one of two found at once; without one of them none is found still
    ant = {Kind.MISSED: HALF}
    expected = np.array([[row.get(kind, 0.0) for kind in ERRORS] for row in (cat, dog, ant)])
    np.testing.assert_allclose(broken.class_gains[[CAT, DOG, ANT]], expected, atol=1e-9)
    assert np.isnan(broken.class_gains[[BUS, ZEBRA]]).all()
    np.testing.assert_allclose(
        [base.gains[kind] for kind in ERRORS], expected[:2].mean(axis=0), atol=1e-9
    )  # the bus is in no mean
    np.testing.assert_allclose([novel.gains[kind] for kind in ERRORS], expected[2], atol=1e-9)
    np.testing.assert_allclose([every.gains[kind] for kind in ERRORS], expected.mean(axis=0), atol=1e-9)
    assert (base.ap50, novel.ap50) == (pytest.approx((100 - HALF) / 2), pytest.approx(100 - HALF))
    assert base.false_negative_gain == pytest.approx(HALF / 2)  # the cat; a class of which nothing was found stays at 0
    assert (base.false_positive_gain, novel.false_negative_gain) == (pytest.approx(0), pytest.approx(HALF))


@pytest.mark.parametrize(
    ("kind", "row", "item"),
    [
        (Kind.BACKGROUND, (2, CAT, AWAY, 0.9), ()),
        (Kind.BOTH, (2, CAT, lower(3), 0.9), ((2, DOG, WHOLE),)),
        (Kind.CLASSIFICATION, (2, CAT, WHOLE, 0.9), ((2, DOG, WHOLE),)),
        (Kind.DUPLICATE, (1, CAT, lower(8), 0.4), ()),
    ],
)
def test_what_a_wrong_detection_before_a_right_one_costs_its_own_class(
    kind: Kind, row: tuple[int, int, scenes.Box, float], item: tuple[tuple[int, int, scenes.Box], ...]
) -> None:
    objects = scenes.objects_of((1, CAT, WHOLE), (3, CAT, WHOLE), *item)
    found = scenes.found_of(row, (1, CAT, WHOLE, 0.5), (3, CAT, WHOLE, 0.3))
    gains = dict(zip(ERRORS, break_down(found, objects, PROTOCOL).class_gains[CAT].tolist(), strict=True))
    assert gains.pop(kind) == pytest.approx(
        HALF / 3 if kind is Kind.DUPLICATE else 100 / 3
    )  # precision 1, 2/3; or 1/2, 2/3 and so 2/3
    assert set(gains.values()) == {0.0}


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (
            ((1, CAT, lower(3), 0.5), (1, CAT, WHOLE), (1, DOG, lower(3))),
            Kind.LOCALISATION,
        ),  # its own class comes first
        (
            ((1, CAT, lower(6), 0.5), (1, CAT, WHOLE), (1, DOG, lower(6))),
            Kind.CLASSIFICATION,
        ),  # though it is a second cat, too
        (((1, CAT, lower(5), 0.5), (1, CAT, WHOLE)), Kind.DUPLICATE),
        (((1, CAT, lower(4.99), 0.5), (1, CAT, WHOLE)), Kind.LOCALISATION),
        (((1, CAT, lower(1), 0.5), (1, CAT, WHOLE)), Kind.LOCALISATION),
        (((1, CAT, lower(0.99), 0.5), (1, CAT, WHOLE)), Kind.BACKGROUND),
        (((1, CAT, lower(5), 0.5), (1, DOG, WHOLE)), Kind.CLASSIFICATION),
        (((1, CAT, lower(4.99), 0.5), (1, DOG, WHOLE)), Kind.BOTH),
        (((1, CAT, lower(1), 0.5), (1, DOG, WHOLE)), Kind.BOTH),
        (((1, CAT, lower(0.99), 0.5), (1, DOG, WHOLE)), Kind.BACKGROUND),
    ],
)
def test_where_kinds_meet(
    rows: tuple[tuple[int, int, scenes.Box, float], tuple[int, int, scenes.Box]], kind: Kind
) -> None:
    """A cat, if there is one, has been found by a better detection."""
    found = scenes.found_of(rows[0], (1, CAT, WHOLE, 0.9)) if (1, CAT, WHOLE) in rows else scenes.found_of(rows[0])
    assert kinds(found, scenes.objects_of(*rows[1:]))[0][0] is kind


def test_an_object_that_is_mislocalised_and_found_by_another_gains_only_what_the_wrong_one_costs() -> None:
    objects = scenes.objects_of((1, CAT, WHOLE))
    found = scenes.found_of((1, CAT, lower(3), 0.9), (1, CAT, WHOLE, 0.5))
    names, errors = kinds(found, objects)
    assert names == [Kind.LOCALISATION, Kind.RIGHT]
    assert (errors.mended_by.tolist(), errors.missed.tolist(), errors.item.tolist()) == ([-1], [False], [0, 0])
    broken = break_down(found, objects, PROTOCOL)
    assert broken.class_gains[CAT, ERRORS.index(Kind.LOCALISATION)] == pytest.approx(
        50
    )  # dropped; mended, it would find it twice


def test_an_object_is_mended_once_by_the_best_of_its_errors() -> None:
    objects = scenes.objects_of((1, CAT, WHOLE))
    found = scenes.found_of(
        (1, DOG, WHOLE, 0.7), (1, ANT, WHOLE, 0.8), (1, CAT, lower(4), 0.9), (1, CAT, lower(3), 0.95)
    )
    names, errors = kinds(found, objects)
    assert names == [Kind.CLASSIFICATION, Kind.CLASSIFICATION, Kind.LOCALISATION, Kind.LOCALISATION]
    assert errors.mended_by.tolist() == [3]
    gains = break_down(found, objects, PROTOCOL).class_gains[CAT]
    assert gains.tolist() == pytest.approx([0, 100, 0, 0, 0, 0])


def test_ties_go_to_the_first_listed() -> None:
    objects = scenes.objects_of((1, DOG, WHOLE), (1, ANT, WHOLE))
    found = scenes.found_of((1, CAT, WHOLE, 0.5), (1, BUS, WHOLE, 0.5))
    names, errors = kinds(found, objects)
    assert names == [Kind.CLASSIFICATION] * 2
    assert errors.item.tolist() == [0, 0]  # the first of two objects that are overlapped alike
    assert errors.mended_by.tolist() == [0, -1]  # and the first of two detections that are scored alike
    assert errors.missed.tolist() == [False, True]


def test_a_crowd_is_no_object_to_be_mistaken() -> None:
    objects = scenes.objects_of((1, CAT, (0, 0, 100, 100), True))
    found = scenes.found_of((1, CAT, WHOLE, 0.9), (1, DOG, WHOLE, 0.8), (1, CAT, (98, 0, 10, 10), 0.7))
    names, errors = kinds(found, objects)
    assert names == [Kind.IGNORED, Kind.BACKGROUND, Kind.BACKGROUND]
    assert (errors.item.tolist(), errors.missed.tolist()) == ([0, -1, -1], [False])
    broken = break_down(found, objects, PROTOCOL)
    assert (broken.groups["all"].objects, broken.groups["all"].ap50, broken.groups["all"].gains[Kind.MISSED]) == (
        0,
        None,
        None,
    )


def test_a_protocol_without_novel_classes_has_no_novel_numbers() -> None:
    found, objects = scenes.found_of((1, CAT, WHOLE, 0.9), (1, DOG, WHOLE, 0.8)), scenes.objects_of((1, CAT, WHOLE))
    broken = break_down(found, objects, Protocol("base alone", ("cat", "dog"), ()))
    novel, base = broken.groups["novel"], broken.groups["base"]
    assert (novel.ap50, novel.objects, set(novel.gains.values()), set(novel.counts.values())) == (None, 0, {None}, {0})
    assert (base.ap50, base.counts[Kind.CLASSIFICATION]) == (pytest.approx(100), 1)
    assert broken.groups["all"] == base
    assert " -" in error_table(broken)


def test_who_is_named_what_is_told_by_group() -> None:
    objects = scenes.objects_of(
        (1, ANT, WHOLE), (2, ANT, WHOLE), (3, ZEBRA, WHOLE), (4, DOG, WHOLE), (5, DOG, WHOLE), (6, DOG, WHOLE)
    )
    found = scenes.found_of(
        (1, CAT, WHOLE, 0.9),
        (2, BUS, WHOLE, 0.9),
        (3, ANT, WHOLE, 0.9),
        (4, ZEBRA, WHOLE, 0.9),
        (5, CAT, WHOLE, 0.9),
        (6, CAT, WHOLE, 0.9),
        (6, BUS, WHOLE, 0.8),
        (6, DOG, AWAY, 0.7),
    )
    assert break_down(found, objects, PROTOCOL).misnamed == {
        "novel": {"novel": 1, "base": 2},
        "base": {"novel": 1, "base": 3},
    }


@pytest.mark.parametrize("seed", range(4))
def test_gains_are_cocoevals_on_detections_that_were_mended(seed: int) -> None:
    found, objects = scenes.random_scene(seed)
    names, errors = kinds(found, objects)
    broken = break_down(found, objects, PROTOCOL)
    plain, finds = _ap50(found, objects), match(found, objects, find_overlaps(found, objects), 1000)
    menders = set(errors.mended_by.tolist())
    for place, kind in enumerate(ERRORS):
        of_kind = np.array([name is kind for name in names])
        kept = ~of_kind | np.isin(np.arange(len(names)), list(menders))
        boxes, labels, left = found.boxes.copy(), found.labels.copy(), np.full(len(objects.labels), True)
        if kind is Kind.CLASSIFICATION:
            labels[of_kind] = objects.labels[errors.item[of_kind]]
        elif kind is Kind.LOCALISATION:
            boxes[of_kind] = objects.boxes[errors.item[of_kind]]
        elif kind is Kind.MISSED:
            left = ~errors.missed
        mended = _ap50(
            Found(found.image_ids[kept], boxes[kept], labels[kept], found.scores[kept]), _those(objects, left)
        )
        np.testing.assert_allclose(broken.class_gains[:, place], mended - plain, atol=1e-9)
        assert (np.abs(mended - plain) > 0.1).any()
    good = finds.verdict != Verdict.WRONG
    without = (
        _ap50(Found(found.image_ids[good], found.boxes[good], found.labels[good], found.scores[good]), objects) - plain
    )
    all_found = _ap50(found, _those(objects, (finds.finder >= 0) | objects.crowd)) - plain
    for name, group in broken.groups.items():
        part = group_labels(PROTOCOL, name)
        assert group.false_positive_gain == pytest.approx(without[part].mean(), abs=1e-9)
        assert group.false_negative_gain == pytest.approx(all_found[part].mean(), abs=1e-9)
        assert sum(group.counts[kind] for kind in ERRORS[:-1]) == group.false_positives
        assert group.objects - group.found == group.false_negatives >= group.counts[Kind.MISSED] > 0


def test_the_tree_is_json_and_names_every_class(one_of_each: tuple[Found, Objects]) -> None:
    broken: ErrorBreakdown = break_down(*one_of_each, PROTOCOL)
    tree = json.loads(json.dumps(broken.to_tree(), allow_nan=False))
    assert list(tree["groups"]) == ["novel", "base", "all"]
    assert tree["groups"]["base"]["counts"] == dict.fromkeys([kind.value for kind in ERRORS], 1)
    assert tree["groups"]["novel"]["gains"]["missed"] == pytest.approx(HALF)
    assert list(tree["classes"]) == list(PROTOCOL.names)
    assert tree["classes"]["bus"]["gains"] is None
    assert tree["classes"]["cat"]["gains"]["localisation"] == pytest.approx(HALF / 2)


def _ap50(found: Found, objects: Objects) -> np.ndarray:
    return np.asarray(scenes.cocoeval(found, objects)["precision"][0, :, :, 0, -1].mean(axis=0) * 100)


def _those(objects: Objects, kept: np.ndarray) -> Objects:
    return Objects(objects.image_ids[kept], objects.boxes[kept], objects.labels[kept], objects.crowd[kept])
