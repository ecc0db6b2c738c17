"""The optimisation loop that training stages share: schedule, precision, interval means, a sound loss, an average of
the weights (`train.ema`), and a state to go on from.

In several processes (torch.distributed) each has its part of every batch; `model` is then wrapped in DDP. The losses of
the last steps are looked at together: a GPU is not waited for at every step, and none that is unsound goes by.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hdovd.config.recipe import ScheduleConfig
from hdovd.core import HdovdError
from hdovd.modeling.distributed import mean_count
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import choose, training_products
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.dataloading.loader import TrainingBatches, key_of

EXPLODED = 1e4  # a sum of losses above this teaches nothing any more; sound ones stay below a hundred


class UnsoundLoss(HdovdError):
    """A loss that is not finite, or beyond all bounds. `record`: step, image_ids of this process's part of the batch,
    losses.
    """

    def __init__(self, text: str, record: dict[str, Any]) -> None:
        super().__init__(text)
        self.record = record


class LossWindow:
    """`rows`: of each step its number, the images of this process's part of the batch, and its losses."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.rows: list[tuple[int, list[int], dict[str, Tensor]]] = []

    def add(self, step: int, losses: dict[str, Tensor], image_ids: list[int]) -> None:
        """Of one step: scalars, kept where they are."""
        self.rows.append((step, image_ids, {name: loss.detach().float() for name, loss in losses.items()}))

    def means(self, device: torch.device) -> dict[str, float]:
        """Mean of every loss over steps and processes; empty if there was no step.

        Raises HdovdError, in all processes, for the first step whose losses in one of them are not finite or sum up to
        more than EXPLODED: UnsoundLoss in that one.
        """
        if not self.rows:
            return {}
        table = self._table(device)
        mean = mean_count(table.mean(dim=0))
        table = table.cpu()
        wrong = (~table.isfinite().all(dim=1) | (table.sum(dim=1) > EXPLODED)).nonzero()
        own = int(wrong[0]) if len(wrong) else len(table)
        first = torch.tensor(own, device=device)
        if dist.is_initialized():
            dist.all_reduce(first, dist.ReduceOp.MIN)
        names = list(self.rows[0][2])
        if first < len(table):
            step, image_ids, _ = self.rows[int(first)]
            if own != first:
                raise HdovdError(f"{self._what}: the loss is not sound at step {step} in another process")
            values = dict(zip(names, table[own].tolist(), strict=True))
            raise UnsoundLoss(
                f"{self._what}: the loss is too large to learn from or not finite at step {step}: {values}, images "
                f"{image_ids}; "
                "lower train.lr or set train.clip_norm",
                {"step": step, "image_ids": image_ids, "losses": {k: str(v) for k, v in values.items()}},
            )
        return dict(zip(names, mean.tolist(), strict=True))

    def _table(self, device: torch.device) -> Tensor:
        """(steps, losses)."""
        return torch.stack([torch.stack(list(losses.values())).to(device) for _, _, losses in self.rows])

    def state(self, device: torch.device) -> dict[str, Any]:
        """Losses as means over processes, who all have to ask for it: another number of them may go on with it."""
        return {
            "steps": [step for step, _, _ in self.rows],
            "ids": [image_ids for _, image_ids, _ in self.rows],
            "names": list(self.rows[0][2]) if self.rows else [],
            "losses": mean_count(self._table(device)).cpu() if self.rows else torch.zeros(0),
        }

    def load(self, state: dict[str, Any]) -> None:
        losses = [dict(zip(state["names"], row.unbind(), strict=True)) for row in state["losses"]]
        self.rows = list(zip(state["steps"], state["ids"], losses, strict=True))


WARM_UP = 9  # updates after which half of the average is new: see `WeightAverage`


class WeightAverage:
    """Average of the float parameters and buffers (statistics of batch norms), in float32; one copy of the weights.

    After step t the average is `d average + (1 - d) weights` with `d = min(decay, n / (n + 9))`, n the number of
    averages before: the first is a copy, and early ones forget fast. That is TensorFlow's
    `ExponentialMovingAverage(decay, num_updates)`, `min(decay, (1 + num_updates) / (10 + num_updates))`, after its
    first step; no length of warm-up has to fit the length of a run.

    torch's `AveragedModel` averages all buffers or none. Here the losses' memories (buffers of `training_parts`) are
    rows and counters, not weights, and may change their shape: `model` has them as they are.
    """

    def __init__(self, live: nn.Module, decay: float) -> None:
        self.decay, self.updates, self._live = decay, 0, live
        self._averaged = deepcopy(live).float().requires_grad_(False)
        self._weights = weights_of(self._averaged)

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        live = weights_of(self._live)
        decay = min(self.decay, self.updates / (self.updates + WARM_UP))
        get_ema_multi_avg_fn(decay)(list(self._weights.values()), [live[name].float() for name in self._weights], 0)
        self.updates += 1

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights; all else as the trained one has it now. The same object each time."""
        rest = {name: value for name, value in self._live.state_dict().items() if name not in self._weights}
        self._averaged.load_state_dict(rest, strict=False)
        return self._averaged

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self._weights}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, value in self._weights.items():
            value.copy_(state["weights"][name])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are averaged, by name: parameters and statistics, but no memories."""
    fixed = (*getattr(model, "training_parts", ()), "background_texts")
    return dict(model.named_parameters()) | {
        name: value for name, value in model.named_buffers() if value.is_floating_point() and not name.startswith(fixed)
    }


LOG_EVERY = 50  # steps
Sample = TypeVar("Sample")


class Hooks:
    """What a stage does between the steps of a loop; here nothing."""

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        """Every LOG_EVERY steps and after the last of an epoch: means since the last call. `left_s`: seconds to the
        end.
        """

    def step(self, loop: "Loop[Any]") -> None:
        """After every step. May raise to stop."""

    def epoch(self, loop: "Loop[Any]", epoch: int) -> None:
        """After an epoch, counted from 1; its losses were sound."""


class Loop(Generic[Sample]):
    """Minimises the sum of `losses_of(batch, epoch)`, weighted losses by name, for `config.epochs`; epochs here count
    from 0.

    `id_of` names a sample where a loss is not sound. `begin_epoch` is told every epoch that begins or goes on, counted
    from 1. With `config.accumulate` above 1 the images of a step are split into that many micro-batches of equal size,
    in their order, and the mean of the micro-batches' losses is minimised. Everything that counts steps (schedule, log,
    checkpoints) counts steps of the optimiser.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: Callable[[list[Sample], int], dict[str, Tensor]],
        batches: TrainingBatches[Sample],
        config: ScheduleConfig,
        device: torch.device,
        what: str,
        id_of: Callable[[Sample], int],
        begin_epoch: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.model, self.batches, self.config, self.device = model, batches, config, device
        self._losses_of, self._what, self._id_of, self._begin_epoch = losses_of, what, id_of, begin_epoch
        self._bare: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = build_optimizer(self._bare, config)
        self._average = WeightAverage(self._bare, config.ema) if config.ema else None
        self.step_number, self.total = 0, config.epochs * len(batches)
        self.window = LossWindow(what)
        self._interval = _Interval()
        self._bf16 = choose(config.precision, device, training=True)[0] is Precision.BF16

    @property
    def result(self) -> nn.Module:
        """The model to validate and to keep, not wrapped: with `config.ema` that of the averaged weights."""
        return self._bare if self._average is None else self._average.model

    def run(self, hooks: Hooks) -> None:
        """Go on from `step_number` to the end. Raises HdovdError, with the window's record of the batch, for a loss
        that is not sound.
        """
        shown = self.total if self.batches.dealing.rank == 0 and sys.stderr.isatty() else 0
        with progress(None, self._what, "step", shown, initial=self.step_number) as bar:
            while self.step_number < self.total:
                self._interval = _Interval()  # what was done meanwhile does not count
                epoch, done = divmod(self.step_number, len(self.batches))
                self.model.train()
                self._begin_epoch(epoch + 1)
                self.batches.seek(epoch, done)
                for batch in self._waiting():
                    self.take_step(batch, epoch)
                    bar.update()
                    at_end = self.step_number == (epoch + 1) * len(self.batches)
                    if self.step_number % LOG_EVERY == 0 or at_end:
                        self._tell(epoch, hooks)
                    if not at_end:
                        hooks.step(self)
                self.window.means(self.device)  # sound?
                hooks.epoch(self, epoch + 1)

    def _waiting(self) -> Iterator[list[Sample]]:
        """The batches; how long each one takes to come is counted."""
        before = time.monotonic()
        for batch in self.batches:
            self._interval.waited_s += time.monotonic() - before
            yield batch
            before = time.monotonic()

    def take_step(self, batch: list[Sample], epoch: int) -> None:
        """One step of optimisation. What draws from torch's generator, such as a loss or a backbone of the user's own,
        draws by seed, step and process.
        """
        torch.manual_seed(key_of(self.config.seed, -1 - self.step_number, self.batches.dealing.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(self.step_number, len(self.batches), self.config)
        self.optimizer.zero_grad(set_to_none=True)  # the last step's make room for the activations
        with training_products(self.device):
            losses = self._add_gradients(batch, epoch)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self._average is not None:
            self._average.update()
        self.step_number += 1
        self._interval.steps += 1
        self._interval.images += len(batch)
        self.window.add(self.step_number, losses, [self._id_of(sample) for sample in batch])

    def _add_gradients(self, batch: list[Sample], epoch: int) -> dict[str, Tensor]:
        """The mean over the step's micro-batches of each loss, detached; the gradient of their sum is added to the
        parameters'.
        """
        size = -(-len(batch) // self.batches.dealing.accumulate)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        found: list[dict[str, Tensor]] = []
        for number, part in enumerate(parts, start=1):
            alone = number < len(parts)  # processes average their gradients with the last micro-batch
            with self.model.no_sync() if alone and isinstance(self.model, DistributedDataParallel) else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                    losses = self._losses_of(part, epoch)
                (torch.stack(list(losses.values())).sum() / len(parts)).backward()
            found.append({name: loss.detach() for name, loss in losses.items()})
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def _tell(self, epoch: int, hooks: Hooks) -> None:
        since, self._interval = self._interval, _Interval()
        seconds = time.monotonic() - since.began
        entry = {
            "step": self.step_number,
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": since.images / seconds * self.batches.dealing.world,
            "data_wait": since.waited_s / seconds,
            "memory_gb": memory_gb(self.device),
            **self.window.means(self.device),
        }
        self.window.rows.clear()
        hooks.interval(entry, (self.total - self.step_number) * seconds / since.steps)

    def state(self) -> dict[str, Any]:
        """All that `load` needs to go on as if nothing had happened. All processes have to ask for it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
            "window": self.window.state(self.device),
            **({} if self._average is None else {"ema": self._average.state()}),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = int(state["step"])
        self.window.load(state["window"])
        if self._average is not None:
            self._average.load(state["ema"])


@dataclass(slots=True)
class _Interval:
    """Steps and images of this process since the last entry of the log, and seconds of that spent waiting for data."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    images: int = 0
    waited_s: float = 0.0


def memory_gb(device: torch.device) -> float:
    """The most memory so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ) / 1e9


def build_optimizer(model: nn.Module, config: ScheduleConfig) -> torch.optim.Optimizer:
    """SGD or AdamW in one pass over the memory of the parameters (`fused`): of AdaMixer's 146 million, several cost a
    tenth of a step.

    Parameters that the model's `undecayed` names, such as norms, biases and temperatures, are a group without weight
    decay. A checkpoint brings its own choice of `fused`: runs that were begun before there was one go on as they began.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spared = {name for name in named for pattern in getattr(model, "undecayed", ()) if fnmatch(name, pattern)}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if name not in spared]},
        *([{"params": [named[name] for name in named if name in spared], "weight_decay": 0.0}] if spared else []),
    ]
    fused = next(iter(named.values())).device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=fused)


def lr_factor(step: int, steps_per_epoch: int, config: ScheduleConfig) -> float:
    """The factor on `lr` at 0-based `step`: linear warm-up from 0.001, then steps of 0.1 or a cosine to zero."""
    warmup = config.warmup_iterations
    rise = 1.0 if step >= warmup else 0.001 + 0.999 * step / warmup
    if config.schedule == "step":
        return float(rise * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs))
    return rise * (1 + math.cos(math.pi * min(step / (config.epochs * steps_per_epoch), 1.0))) / 2
