"""The memories E and Q of the alignment losses (METHOD sections 4 and 6)."""

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """A first-in first-out memory of L2-normalised rows, newest first. Its rows are in the checkpoint.

    A row that was never written is zero, so the number of rows held follows from the rows themselves.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", torch.zeros(length, dim))
        self._held = 0
        self.register_load_state_dict_post_hook(FeatureQueue._recount)

    @staticmethod
    def _recount(module: nn.Module, _: object) -> None:
        assert isinstance(module, FeatureQueue)
        module._held = int((module.rows != 0).any(dim=1).sum())

    def read(self) -> Tensor:
        """(m, D) rows held, newest first, m at most the length."""
        return self.rows[: self._held]

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Put (n, D) rows in front; the oldest fall out."""
        merged = torch.cat([rows.detach().to(self.rows), self.read()])[: len(self.rows)]
        self.rows = torch.cat([merged, self.rows.new_zeros(len(self.rows) - len(merged), self.rows.shape[1])])
        self._held = len(merged)
