"""The reliability weight fitted to cosines whose centre and width are known, and to those that say little."""

from __future__ import annotations

import numpy as np
import pytest

from hdovd.core.errors import HdovdError
from hdovd.pipelines.extraction.label_weights import LEAST, Evidence, area_under_curve, fit_probability, fit_reliability


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


def test_the_weight_is_the_probability_of_a_right_label() -> None:
    right, wrong = _normal(0.29, 0.23, 0.03, 30_000, 10_000)  # odds of 3 to 1 move the centre by log 3 widths
    cosines, is_right = np.concatenate([right, wrong]), np.repeat([True, False], [len(right), len(wrong)])
    fit = fit_probability(cosines, is_right)
    width = 0.03**2 / 0.06
    assert fit.centre == pytest.approx(0.26 - width * np.log(3), abs=0.002)
    assert fit.width == pytest.approx(width, rel=0.06)
    assert fit.scale == 1
    for low in (0.2, 0.25, 0.3):
        near = (cosines > low) & (cosines < low + 0.01)
        assert fit.weights(cosines[near]).mean() == pytest.approx(is_right[near].mean(), abs=0.03)


@pytest.mark.parametrize("gap", [0.0, -0.05])
def test_where_the_cosine_tells_nothing_every_label_weighs_the_share_of_right_ones(gap: float) -> None:
    right, wrong = _normal(0.25 + gap, 0.25, 0.03, 6_000, 14_000)
    fit = fit_probability(np.concatenate([right, wrong]), np.repeat([True, False], [6_000, 14_000]))
    assert fit.weights(np.array([0.2, 0.25, 0.3])) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_labels_of_one_kind_are_fitted_too(share: float) -> None:
    cosines = np.linspace(0.2, 0.3, 200)
    fit = fit_probability(cosines, np.full(200, share == 1))
    assert fit.weights(cosines) == pytest.approx(share, abs=0.01)
    assert np.isfinite([fit.centre, fit.width, fit.auc]).all()


def test_proposals_on_nothing_count_as_wrong_labels() -> None:
    """Half of the proposals on no object: as if there were the wrong labels of as many boxes more."""
    right, wrong = _normal(0.29, 0.23, 0.03, 8_000, 2_000)
    some = Evidence(np.concatenate([right, wrong]), np.repeat([True, False], [8_000, 2_000]), 4)
    more = _normal(0.29, 0.23, 0.03, 8_000, 12_000)
    all_of_them = Evidence(np.concatenate(more), np.repeat([True, False], [8_000, 12_000]), 4)
    assert some.fitted(0.5)["centre"] == pytest.approx(all_of_them.fitted(None)["centre"], abs=0.003)
    assert some.fitted(0.5)["centre"] > some.fitted(1.0)["centre"] == some.fitted(None)["centre"]
    for share in (0.2, 0.9):
        fitted = some.fitted(share)
        assert 0.9 < fitted["weight_of_right"] < 1
        assert fitted["weight_of_wrong"] < 0.5


def test_of_proposals_with_a_label_more_lie_on_objects() -> None:
    """Half of 100 proposals lie on objects; 90 % of base boxes have a label, so 45 of these too; 60 have one."""
    right, wrong = _normal(0.29, 0.23, 0.03, 8_000, 1_000)
    cosines, are_right = np.concatenate([right, wrong]), np.repeat([True, False], [len(right), len(wrong)])
    some = Evidence(cosines, are_right, 1, unnamed=len(cosines) // 9)
    fitted = some.fitted(0.5, 0.6)
    assert (fitted["on_object"], fitted["proposals_on_object"]) == (pytest.approx(0.75, abs=1e-3), 0.5)
    assert fitted["centre"] == Evidence(cosines, are_right, 1).fitted(fitted["on_object"])["centre"]
    assert some.fitted(0.9, 0.6)["on_object"] == 1.0
    assert "proposals_on_object" not in some.fitted(None, 0.6)


def test_weights_of_labels_that_nothing_tells_apart_fall() -> None:
    """Right ones would weigh 1 in the mean by `fit_reliability`, and wrong ones nearly as much."""
    rng = np.random.default_rng(0)
    blind = Evidence(rng.normal(0.25, 0.03, 20_000).astype(np.float32), rng.random(20_000) < 0.4, 4)
    fitted = blind.fitted(0.5)
    assert fitted["weight_of_right"] == pytest.approx(0.2, abs=0.02)
    assert fitted["weight_of_wrong"] == pytest.approx(0.2, abs=0.02)


def test_too_few_labels_fit_nothing() -> None:
    right, _ = _normal(0.29, 0.23, 0.03, 10, 10)
    with pytest.raises(HdovdError, match="5 labels of base boxes are too few"):
        Evidence(right[:5], np.ones(5, bool), 1).fitted(None)
