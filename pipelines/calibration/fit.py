"""The reliability weight of pseudo labels, fitted to the cosines of right and of wrong labels (METHOD section 2).

`w = scale * sigmoid((cos(v, u) - centre) / width)`. n right and m wrong labels.

Centre and width are a logistic regression of "right" on the cosine in which all right labels together count as much as
all wrong ones: how often a pseudo box's right noun is offered is not known from base boxes, so neither is preferred,
and the centre is the cosine at which a label is as likely to be either. Its targets are Platt's, (n + 1) / (n + 2) and
1 / (m + 2) instead of 1 and 0 (Platt, 1999, "Probabilistic outputs for support vector machines"): that keeps the width
above 0 where no cosine is both right and wrong.

The scale makes the mean weight of the right labels 1: a pseudo box whose label is right counts on average as a base box
does. It lies between 1, for cosines that tell right from wrong, and 2, for those that say nothing; the known variants
have 1 and 1.3.
"""

from dataclasses import dataclass

import numpy as np

from hdovd.core.errors import HdovdError

LEAST = 10  # labels of each kind; below MANY the fit is told to be uncertain
MANY = 200
STEPS = 100
LEAST_SLOPE = 1e-3  # for cosines in units of their standard deviation: below, they say nothing


@dataclass(frozen=True, slots=True)
class Fit:
    """`centre` and `width` in units of the cosine. `auc`: how often a right label has the higher cosine of the two."""

    centre: float
    width: float
    scale: float
    auc: float

    def weights(self, cosines: np.ndarray) -> np.ndarray:
        """(n,) in 0..scale."""
        return self.scale * _sigmoid((cosines - self.centre) / self.width)


def fit_reliability(right: np.ndarray, wrong: np.ndarray) -> Fit:
    """The weight that fits cosines (n,) of right and (m,) of wrong labels. Raises HdovdError if they do not say
    enough."""
    for name, cosines in (("right", right), ("wrong", wrong)):
        if len(cosines) < LEAST:
            raise HdovdError(f"{len(cosines)} {name} labels are too few to fit a weight to, expected {LEAST} or more")
        if not np.isfinite(cosines).all():
            raise HdovdError(
                f"{int((~np.isfinite(cosines)).sum())} of {len(cosines)} cosines of {name} labels are not finite"
            )
    both = np.concatenate([right, wrong]).astype(np.float64)
    mean, spread, auc = both.mean(), both.std(), area_under_curve(right, wrong)
    slope, offset = _logistic((both - mean) / spread, len(right)) if spread > 1e-6 else (0.0, 0.0)
    if slope < LEAST_SLOPE:
        raise HdovdError(
            f"the cosines do not tell right labels from wrong ones (AUC {auc:.3f}; means {right.mean():.3f} and "
            f"{wrong.mean():.3f}): no weight can be fitted. Does this CLIP know the classes, by these prompts?"
        )
    centre, width = float(mean - spread * offset / slope), float(spread / slope)
    return Fit(centre, width, float(1 / _sigmoid((right.astype(np.float64) - centre) / width).mean()), auc)


def area_under_curve(right: np.ndarray, wrong: np.ndarray) -> float:
    """The share of all pairs of a right and a wrong label in which the right one has the higher cosine; ties count
    half.
    """
    order = np.sort(wrong)
    below, up_to = np.searchsorted(order, right, "left"), np.searchsorted(order, right, "right")
    return float((below + up_to).sum() / (2 * len(right) * len(wrong)))


def _logistic(x: np.ndarray, right: int) -> tuple[float, float]:
    """Slope and offset of p = sigmoid(slope * x + offset); x: the `right` right ones first. Newton's method, with
    halved steps.
    """
    wrong = len(x) - right
    target = np.repeat([(right + 1) / (right + 2), 1 / (wrong + 2)], [right, wrong])
    weight = np.repeat([0.5 / right, 0.5 / wrong], [right, wrong])
    design = np.stack([x, np.ones_like(x)], axis=1)
    at = np.zeros(2)

    def loss(point: np.ndarray) -> float:
        logit = design @ point
        return float((weight * (np.logaddexp(0, logit) - target * logit)).sum())

    for _ in range(STEPS):
        p = _sigmoid(design @ at)
        gradient = design.T @ (weight * (p - target))
        hessian = design.T @ (design * (weight * p * (1 - p))[:, None]) + 1e-12 * np.eye(2)
        step, now = np.linalg.solve(hessian, gradient), loss(at)
        while loss(at - step) > now and np.abs(step).max() > 1e-10:
            step = step / 2
        at = at - step
        if np.abs(step).max() < 1e-8:
            break
    return float(at[0]), float(at[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))
