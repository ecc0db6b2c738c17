"""Losses of the global batch under data-parallel training (METHOD section 10), and the memories E and Q of the
alignment losses (sections 4 and 6).

Each process calculates the losses of its own images; what a loss sets against each other (pairs, prompts) is
gathered from all processes first, and what a sum is divided by is counted over all of them. The mean over
processes of losses and gradients, which DistributedDataParallel takes, is then that of the global batch. In
one process everything here is the identity. All processes must call
these functions alike. W processes, n rows of this one, D columns.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def counts_of_ranks(count: int, device: torch.device) -> list[int]:
    """The `count` of every process, in rank order."""
    if world_size() == 1:
        return [count]
    own = torch.tensor([count], device=device)
    found = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(found, own)
    return [int(n) for n in torch.cat(found).tolist()]


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of all processes, in rank order: (n, D) -> (sum of all n, D). Any n, zero included.

    The gradient is W times that of the own rows: where every process calculates the same loss of all rows,
    the mean of the gradients over processes is the gradient of that loss.

    Args:
        counts: n of every process, if they are known (`counts_of_ranks`).
    """
    if world_size() == 1:
        return rows
    counts = counts_of_ranks(len(rows), rows.device) if counts is None else counts
    return cast(Tensor, _GatherRows.apply(rows, counts))


def mean_count(count: Tensor) -> Tensor:
    """The mean over processes of a count (), float32. A sum divided by it, averaged over processes, is the global
    quotient.
    """
    total = count.detach().to(torch.float32, copy=True)
    if world_size() > 1:
        dist.all_reduce(total)
        total /= world_size()
    return total


def divisor(count: Tensor) -> Tensor:
    """`mean_count` for a division: a global count of zero counts as one."""
    return mean_count(count).clamp(min=1 / world_size())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.first, ctx.count = sum(counts[: rank()]), len(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # a gather wants equal shapes
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        if len(padded):
            dist.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.first : ctx.first + ctx.count] * world_size(), None


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
    def _recount(module: "FeatureQueue", _: object) -> None:
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
