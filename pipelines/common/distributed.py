"""The processes of one training run: one, or those that torchrun started, each with its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hdovd.pipelines.common.device import pick_device

PATIENCE = timedelta(hours=3)  # how long the others wait while the first one validates


@dataclass(frozen=True, slots=True)
class Team:
    """This process among all. `control`: a gloo group beside NCCL's, for what is decided on the CPU."""

    rank: int
    world: int
    device: torch.device
    control: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes: one does."""
        return self.rank == 0

    def agree(self, *flags: int) -> list[int]:
        """The largest value of each flag in any process."""
        if self.world == 1:
            return list(flags)
        values = torch.tensor(flags)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return values.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier(group=self.control)


@contextmanager
def team(device: str) -> Iterator[Team]:
    """Join the others, if torchrun started several; on GPUs each has its own. Raises HdovdError for a device that is not there."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Team(0, 1, pick_device(device))
        return
    local = os.environ["LOCAL_RANK"]
    own = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if own.type == "cuda" else None
        yield Team(dist.get_rank(), world, own, control)
    finally:
        dist.destroy_process_group()
