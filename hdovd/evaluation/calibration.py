"""Do scores mean what they say: of detections scored 0.8, are 8 in 10 right? B bins of equal width."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Reliability:
    """Detections of one group by score: `edges` (B+1,); `counts` (B,); `mean_scores` (B,) and `precisions` (B,), the
    share that is right at IoU 0.5, NaN in an empty bin. Ignored detections are left out. `calibration_error`: the
    expected one, the mean over detections of
    |precision - mean score| of their bin (Naeini et al., 2015); None without detections.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean_scores: np.ndarray
    precisions: np.ndarray
    calibration_error: float | None

    def to_tree(self) -> dict[str, Any]:
        """The fields as lists; NaN as None."""
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "mean_scores": _listed(self.mean_scores),
            "precisions": _listed(self.precisions),
            "calibration_error": self.calibration_error,
        }


def score_reliability(scores: np.ndarray, right: np.ndarray, bins: int = 10) -> Reliability:
    """Scores (n,) in 0..1 against whether the detections are right (n,) bool. A score on an edge belongs to the bin
    above it, 1 to the last.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, scores, "right") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    held = np.maximum(counts, 1)
    means = np.where(counts > 0, np.bincount(place, scores, bins) / held, np.nan)
    precisions = np.where(counts > 0, np.bincount(place, right, bins) / held, np.nan)
    error = float(np.nansum(counts * np.abs(precisions - means)) / len(scores)) if len(scores) else None
    return Reliability(edges, counts, means, precisions, error)


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else v for v in values.tolist()]
