"""Curves by hand; against COCOeval they are tested with the matching."""

from __future__ import annotations

import json

import matching_scenes as scenes
import numpy as np
import pytest
from matching_scenes import ANT, CAT, DOG, PROTOCOL, ZEBRA

from hdovd.evaluation.matching import Curves, find_overlaps, match, precision_curves


@pytest.fixture
def curves() -> Curves:
    """Two cats, found at scores 0.9 and 0.5 with a wrong one between; a dog not found; an ant found at once."""
    objects = scenes.objects_of(
        (1, CAT, (0, 0, 10, 10)), (1, CAT, (50, 0, 10, 10)), (1, DOG, (0, 50, 10, 10)), (2, ANT, (0, 0, 10, 10))
    )
    found = scenes.found_of(
        (1, CAT, (0, 0, 10, 10), 0.9),
        (1, CAT, (50, 0, 10, 10), 0.5),
        (1, CAT, (80, 80, 10, 10), 0.7),
        (2, ANT, (0, 0, 10, 10), 0.3),
        (2, ZEBRA, (0, 0, 10, 10), 0.8),
    )
    return precision_curves(found, objects, match(found, objects, find_overlaps(found, objects), 100), PROTOCOL)


def test_precision_and_score_at_every_recall(curves: Curves) -> None:
    np.testing.assert_allclose(curves.precision[CAT], [1.0] * 51 + [2 / 3] * 50)
    assert curves.scores[CAT].tolist() == [0.9] * 51 + [0.5] * 50
    assert curves.precision[DOG].tolist() == curves.scores[DOG].tolist() == [0.0] * 101
    assert curves.precision[ANT].tolist() == pytest.approx([1.0] * 101)
    assert np.isnan(curves.precision[ZEBRA]).all()
    assert curves.ap50()[[CAT, DOG, ANT]].tolist() == pytest.approx([100 * (51 + 50 * 2 / 3) / 101, 0, 100])


def test_a_group_is_the_mean_over_its_classes_with_objects(curves: Curves) -> None:
    groups = [curves.group(name) for name in ("base", "novel", "all")]
    np.testing.assert_allclose(
        groups,
        [
            curves.precision[[CAT, DOG]].mean(axis=0),
            curves.precision[ANT],
            curves.precision[[CAT, DOG, ANT]].mean(axis=0),
        ],
    )
    nothing = Curves(PROTOCOL, np.where(np.arange(5)[:, None] >= 3, np.nan, curves.precision), curves.scores)
    assert nothing.group("novel") is None


def test_its_tree_is_json(curves: Curves) -> None:
    tree = json.loads(json.dumps(curves.to_tree(), allow_nan=False))
    assert tree["recall"][29] == 0.29
    assert tree["classes"]["zebra"] is None
    assert tree["classes"]["cat"]["precision"][50:52] == [1.0, 0.66667]
    assert tree["groups"]["novel"] == [1.0] * 101
