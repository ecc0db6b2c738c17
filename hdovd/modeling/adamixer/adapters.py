"""From the class feature c to text space, two ways (HD-OVD, METHOD sections 5 and 11). Called by `model`.

D embedding size, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextAdapters(nn.Module):
    """`classified` is what the classifier compares with its prompts; `distilled` what the losses in text space are about.

    The second one's weights are made of the last ones of the first, which learn nothing by it. It starts as the identity.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.visual_to_text = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.transfer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for start in self.transfer[-1].parameters():
            nn.init.zeros_(start)

    def classified(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        moved: Tensor = self.visual_to_text(c)
        return c + moved.float()

    def distilled(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        last = self.visual_to_text[-1]
        assert isinstance(last, nn.Linear)
        with torch.autocast(c.device.type, enabled=False):
            moved: Tensor = c @ self.transfer(last.weight.detach()).T
            return c + moved
