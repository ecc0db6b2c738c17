"""Two sets of detections of one picture that may differ by rounding: near ties come in either order."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from hdovd.modeling.boxes import Detections


def require_alike(found: Detections, expected: Detections, *, pixels: float, score: float) -> None:
    """One detection for each, of the same label, within so many pixels and so much score; order counts where scores are
    further apart.

    Rounding changes no score by more than `score`, so only detections whose scores are nearer than twice that may
    change places.
    """
    assert len(found.labels) == len(expected.labels)
    if not len(expected.labels):
        return
    fits = (found.labels[:, None] == expected.labels[None]) & (
        (found.scores[:, None] - expected.scores[None]).abs() <= score
    )
    fits &= (found.boxes[:, None] - expected.boxes[None]).abs().amax(dim=2) <= pixels
    rows, columns = linear_sum_assignment(~fits.numpy())
    wrong = [int(column) for row, column in zip(rows, columns, strict=True) if not fits[row, column]]
    assert not wrong, (
        f"expected and not found: {[(expected.labels[i], expected.boxes[i], expected.scores[i]) for i in wrong[:3]]}"
    )
    assert np.all(np.diff(found.scores.numpy()) <= 0), "best first"
