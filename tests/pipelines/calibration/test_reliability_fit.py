"""The reliability weight fitted to cosines whose centre and width are known, and to those that say little."""

from __future__ import annotations

import numpy as np
import pytest

from hdovd.core.errors import HdovdError
from hdovd.pipelines.calibration.calibrate import LEAST, area_under_curve, fit_reliability


def _normal(
    right: float, wrong: float, spread: float, n: int = 40_000, m: int = 40_000
) -> tuple[np.ndarray, np.ndarray]:
    """Two normal distributions of one spread: the logistic of their odds has centre (right + wrong) / 2 and width s^2 /
    (right - wrong).
    """
    rng = np.random.default_rng(0)
    return rng.normal(right, spread, n).astype(np.float32), rng.normal(wrong, spread, m).astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(40_000, 40_000), (60_000, 6_000), (3_000, 60_000)])
def test_known_centre_and_width_come_back_however_many_there_are_of_each(n: int, m: int) -> None:
    fit = fit_reliability(*_normal(0.29, 0.23, 0.03, n, m))
    assert fit.centre == pytest.approx(0.26, abs=0.002)
    assert fit.width == pytest.approx(0.03**2 / 0.06, rel=0.06)


def test_right_labels_weigh_one_on_average() -> None:
    right, wrong = _normal(0.29, 0.25, 0.03)
    fit = fit_reliability(right, wrong)
    by_hand = fit.scale / (1 + np.exp(-(right.astype(float) - fit.centre) / fit.width))
    assert by_hand.mean() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(fit.weights(right), by_hand, rtol=1e-5)
    assert 1 < fit.scale < 2
    assert fit.weights(wrong).mean() < 0.7


def test_what_is_told_apart_better_is_weighed_more_sharply() -> None:
    sharp, dull = (fit_reliability(*_normal(0.3, 0.2, spread)) for spread in (0.02, 0.08))
    assert sharp.width < dull.width
    assert sharp.scale < dull.scale
    assert sharp.auc > dull.auc


@pytest.mark.parametrize("gap", [0.001, 0.4])
def test_cosines_that_are_told_apart_without_fault_keep_a_width(gap: float) -> None:
    right, wrong = np.linspace(0.3, 0.35, 500), np.linspace(0.25, 0.3 - gap, 500)
    fit = fit_reliability(right, wrong)
    assert fit.auc == 1
    assert 1e-6 < fit.width < 0.1
    assert wrong.max() < fit.centre < right.min()
    assert 1 <= fit.scale < 1.1


def test_shifted_and_stretched_cosines_shift_and_stretch_the_weight() -> None:
    right, wrong = _normal(0.29, 0.25, 0.03, 2_000, 2_000)
    one, other = fit_reliability(right, wrong), fit_reliability(right * 0.5 + 0.4, wrong * 0.5 + 0.4)
    assert other.centre == pytest.approx(one.centre * 0.5 + 0.4, abs=1e-4)
    assert other.width == pytest.approx(one.width * 0.5, rel=1e-3)
    assert other.scale == pytest.approx(one.scale, rel=1e-3)


def test_area_under_curve_by_hand() -> None:
    assert area_under_curve(np.array([0.3, 0.2]), np.array([0.1, 0.2, 0.25])) == pytest.approx((3 + 1.5) / 6)


@pytest.mark.parametrize(
    ("right", "wrong", "match"),
    [
        (np.zeros(0), np.full(50, 0.2), "0 right labels are too few"),
        (np.full(50, 0.3), np.full(LEAST - 1, 0.2), "9 wrong labels are too few"),
        (np.full(50, 0.25), np.full(50, 0.25), "do not tell right labels from wrong"),
        (np.linspace(0.1, 0.2, 50), np.linspace(0.2, 0.3, 50), "do not tell right labels from wrong"),
        (np.r_[np.full(50, 0.3), np.nan], np.full(50, 0.2), "1 of 51 cosines of right labels are not finite"),
    ],
)
def test_cosines_that_say_nothing_are_refused(right: np.ndarray, wrong: np.ndarray, match: str) -> None:
    with pytest.raises(HdovdError, match=match):
        fit_reliability(right, wrong)
