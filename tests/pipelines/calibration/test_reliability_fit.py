"""The reliability weight fitted to cosines whose centre and width are known, and to those that say little."""

from __future__ import annotations

import numpy as np
import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.extraction.label_weights import LEAST, Evidence, Fit, area_under_curve, fit_probability


def _normal(
    right: float, wrong: float, spread: float, n: int = 40_000, m: int = 40_000
) -> tuple[np.ndarray, np.ndarray]:
    """Two normal distributions of one spread: the logistic of their odds has centre (right + wrong) / 2 and width s^2 /
    (right - wrong).
    """
    rng = np.random.default_rng(0)
    return rng.normal(right, spread, n).astype(np.float32), rng.normal(wrong, spread, m).astype(np.float32)


def _fit(right: np.ndarray, wrong: np.ndarray) -> Fit:
    return fit_probability(np.concatenate([right, wrong]), np.repeat([True, False], [len(right), len(wrong)]))


@pytest.mark.parametrize(("n", "m"), [(40_000, 40_000), (60_000, 6_000), (3_000, 60_000)])
def test_known_centre_and_width_come_back(n: int, m: int) -> None:
    """Odds of n to m move the centre by log(n / m) widths."""
    fit, width = _fit(*_normal(0.29, 0.23, 0.03, n, m)), 0.03**2 / 0.06
    assert fit.centre == pytest.approx(0.26 - width * np.log(n / m), abs=0.003)
    assert fit.width == pytest.approx(width, rel=0.06)
    assert fit.scale == 1


def test_the_scale_by_hand() -> None:
    """As far from 1 towards what makes right labels weigh 1 in the mean as the AUC is from 0.5 towards 1."""
    right, wrong = _normal(0.29, 0.25, 0.03)
    labels = np.repeat([True, False], [len(right), len(wrong)])
    fitted = Evidence(np.concatenate([right, wrong]), labels, 4).fitted(None)
    centre, width, auc = (fitted[name] for name in ("centre", "width", "auc"))
    of_right, of_wrong = ((1 / (1 + np.exp((centre - cosines) / width))).mean() for cosines in (right, wrong))
    scale = 1 + (2 * auc - 1) * (1 / of_right - 1)
    assert 1.1 < scale < 1 / of_right - 0.05
    assert fitted["scale"] == pytest.approx(scale, rel=1e-3)
    assert fitted["weight_of_right"] == pytest.approx(scale * of_right, rel=1e-3)
    assert fitted["weight_of_wrong"] == pytest.approx(scale * of_wrong, rel=1e-3)


def test_what_is_told_apart_better_is_weighed_more_sharply() -> None:
    sharp, dull = (_fit(*_normal(0.3, 0.2, spread)) for spread in (0.02, 0.08))
    assert sharp.width < dull.width
    assert sharp.auc > dull.auc


@pytest.mark.parametrize("gap", [0.001, 0.4])
def test_cosines_that_are_told_apart_without_fault_keep_a_width(gap: float) -> None:
    right, wrong = np.linspace(0.3, 0.35, 500), np.linspace(0.25, 0.3 - gap, 500)
    fit = _fit(right, wrong)
    assert fit.auc == 1
    assert 1e-6 < fit.width < 0.1
    assert wrong.max() < fit.centre < right.min()
    whole = Evidence(np.concatenate([right, wrong]), np.repeat([True, False], 500), 4).fitted(None)
    assert whole["weight_of_right"] == pytest.approx(1, abs=1e-5)
    assert 1 <= whole["scale"] < 1.1


def test_shifted_and_stretched_cosines_shift_and_stretch_the_weight() -> None:
    right, wrong = _normal(0.29, 0.25, 0.03, 2_000, 2_000)
    one, other = _fit(right, wrong), _fit(right * 0.5 + 0.4, wrong * 0.5 + 0.4)
    assert other.centre == pytest.approx(one.centre * 0.5 + 0.4, abs=1e-4)
    assert other.width == pytest.approx(one.width * 0.5, rel=1e-3)
    assert other.auc == pytest.approx(one.auc, abs=1e-4)


def test_area_under_curve_by_hand() -> None:
    assert area_under_curve(np.array([0.3, 0.2]), np.array([0.1, 0.2, 0.25])) == pytest.approx((3 + 1.5) / 6)


def test_the_weight_is_the_probability_of_a_right_label() -> None:
    right, wrong = _normal(0.29, 0.23, 0.03, 30_000, 10_000)
    cosines, is_right = np.concatenate([right, wrong]), np.repeat([True, False], [len(right), len(wrong)])
    fit = fit_probability(cosines, is_right)
    for low in (0.2, 0.25, 0.3):
        near = (cosines > low) & (cosines < low + 0.01)
        assert fit.weights(cosines[near]).mean() == pytest.approx(is_right[near].mean(), abs=0.03)


@pytest.mark.parametrize("gap", [0.0, -0.05])
def test_where_the_cosine_tells_nothing_every_label_weighs_the_share_of_right_ones(gap: float) -> None:
    right, wrong = _normal(0.25 + gap, 0.25, 0.03, 6_000, 14_000)
    fit = _fit(right, wrong)
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
    rng = np.random.default_rng(0)
    blind = Evidence(rng.normal(0.25, 0.03, 20_000).astype(np.float32), rng.random(20_000) < 0.4, 4)
    fitted = blind.fitted(0.5)
    assert fitted["weight_of_right"] == pytest.approx(0.2, abs=0.02)
    assert fitted["weight_of_wrong"] == pytest.approx(0.2, abs=0.02)


def test_too_few_labels_fit_nothing() -> None:
    right, _ = _normal(0.29, 0.23, 0.03, LEAST, LEAST)
    assert Evidence(right, np.ones(LEAST, bool), 1).fitted(None)["boxes"] == LEAST
    with pytest.raises(HdovdError, match="9 labels of base boxes are too few"):
        Evidence(right[1:], np.ones(LEAST - 1, bool), 1).fitted(None)
