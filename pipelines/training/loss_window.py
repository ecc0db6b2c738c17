"""The losses of the last steps, looked at together: a GPU is not waited for at every step, and none that is unsound
goes by.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdovd.core.errors import HdovdError

EXPLODED = 1e4  # a sum of losses above this teaches nothing any more; sound ones stay below a hundred


class UnsoundLoss(HdovdError):
    """A loss that is not finite, or beyond all bounds. `record`: step, image_ids of this process's part of the batch,
    losses; None where the loss of another process is meant.
    """

    def __init__(self, text: str, record: dict[str, Any] | None) -> None:
        super().__init__(text)
        self.record = record


class LossWindow:
    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: list[int] = []
        self._losses: list[dict[str, Tensor]] = []
        self._ids: list[list[int]] = []

    def add(self, step: int, losses: dict[str, Tensor], image_ids: list[int]) -> None:
        """Of one step: scalars, kept where they are."""
        self._steps.append(step)
        self._losses.append({name: loss.detach().float() for name, loss in losses.items()})
        self._ids.append(image_ids)

    def clear(self) -> None:
        self._steps, self._losses, self._ids = [], [], []

    def means(self, device: torch.device) -> dict[str, float]:
        """Mean of every loss over steps and processes; empty if there was no step.

        Raises UnsoundLoss, in all processes, for the first step whose losses in one of them are not finite or sum up to
        more than EXPLODED.
        """
        if not self._losses:
            return {}
        table = self._table(device)
        mean = _over_processes(table.mean(dim=0))
        table = table.cpu()
        wrong = (~table.isfinite().all(dim=1) | (table.sum(dim=1) > EXPLODED)).nonzero()
        own = int(wrong[0]) if len(wrong) else len(table)
        first = _first_of_processes(own, device)
        if first < len(table):
            self._raise(first, table, is_own=own == first)
        return dict(zip(self._losses[0], mean.tolist(), strict=True))

    def _raise(self, row: int, table: Tensor, *, is_own: bool) -> None:
        if not is_own:
            raise UnsoundLoss(
                f"{self._what}: the loss is not sound at step {self._steps[row]} in another process, which says more",
                None,
            )
        values = dict(zip(self._losses[row], table[row].tolist(), strict=True))
        what = "too large to learn from" if bool(table[row].isfinite().all()) else "not finite"
        raise UnsoundLoss(
            f"{self._what}: the loss is {what} at step {self._steps[row]}: {values}, images {self._ids[row]}; "
            "lower train.lr or set train.clip_norm",
            {"step": self._steps[row], "image_ids": self._ids[row], "losses": {k: str(v) for k, v in values.items()}},
        )

    def _table(self, device: torch.device) -> Tensor:
        """(steps, losses)."""
        return torch.stack([torch.stack(list(losses.values())).to(device) for losses in self._losses])

    def state(self, device: torch.device) -> dict[str, Any]:
        """Losses as means over processes, who all have to ask for it: another number of them may go on with it."""
        losses = _over_processes(self._table(device)).cpu() if self._losses else torch.zeros(0)
        return {
            "steps": self._steps,
            "ids": self._ids,
            "names": list(self._losses[0]) if self._losses else [],
            "losses": losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._steps, self._ids = list(state["steps"]), list(state["ids"])
        self._losses = [dict(zip(state["names"], row.unbind(), strict=True)) for row in state["losses"]]


def _first_of_processes(row: int, device: torch.device) -> int:
    """The smallest row of all processes."""
    if not dist.is_initialized():
        return row
    found = torch.tensor(row, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def _over_processes(values: Tensor) -> Tensor:
    """The mean of what each process has."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
