"""Reliability of scores by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdovd.evaluation.matching import score_reliability


def test_bins_by_hand() -> None:
    scores, right = np.array([0.0, 0.1, 0.25, 0.5, 0.6, 1.0]), np.array([False, False, True, True, False, True])
    told = score_reliability(scores, right, 4)
    assert told.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert told.counts.tolist() == [2, 1, 2, 1]  # an edge belongs to the bin above it, and 1 to the last
    assert told.mean_scores.tolist() == pytest.approx([0.05, 0.25, 0.55, 1.0])
    assert told.precisions.tolist() == [0, 1, 0.5, 1]
    assert told.calibration_error == pytest.approx((2 * 0.05 + 1 * 0.75 + 2 * 0.05 + 1 * 0) / 6)


def test_scores_that_are_true_have_no_error() -> None:
    scores = np.repeat([0.25, 0.75], 8)
    right = np.arange(16) % 4 < np.repeat([1, 3], 8)
    assert score_reliability(scores, right, 10).calibration_error == pytest.approx(0)
    assert score_reliability(scores, ~right, 10).calibration_error == pytest.approx(0.5)


def test_empty_bins_and_no_detections() -> None:
    told = score_reliability(np.array([0.95]), np.array([True]), 2)
    assert np.isnan(told.precisions[0])
    assert told.calibration_error == pytest.approx(0.05)
    assert json.loads(json.dumps(told.to_tree(), allow_nan=False)) == {
        "edges": [0, 0.5, 1],
        "counts": [0, 1],
        "mean_scores": [None, 0.95],
        "precisions": [None, 1],
        "calibration_error": pytest.approx(0.05),
    }
    nothing = score_reliability(np.zeros(0), np.zeros(0, bool))
    assert (nothing.counts.sum(), nothing.calibration_error) == (0, None)
