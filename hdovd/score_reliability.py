"""Do scores mean what they say: of detections scored 0.8, are 8 in 10 right? Called by `pipelines/run_analysis`. B bins of equal width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Reliability:
    """Detections of one group by score: `edges` (B+1,); `counts` (B,); `mean_scores` (B,) and `precisions` (B,), the share that is right
    at IoU 0.5, NaN in an empty bin. Ignored detections are left out. `calibration_error`: the expected one, the mean over detections of
    |precision - mean score| of their bin (Naeini et al., 2015); None without detections."""

    edges: np.ndarray
    counts: np.ndarray
    mean_scores: np.ndarray
    precisions: np.ndarray
    calibration_error: float | None

    def to_tree(self) -> dict[str, Any]:
        """The fields as lists; NaN as None."""
        raise NotImplementedError
