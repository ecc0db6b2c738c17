"""An order of images that tests know beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hdovd.pipelines.dataloading.sampler import EpochOrder


@dataclass(frozen=True, slots=True)
class InOrder(EpochOrder):
    """0, 1, 2, ..., in every epoch."""

    count: int

    def indices(self, epoch: int) -> np.ndarray:
        return np.arange(self.count)
