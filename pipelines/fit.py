"""The optimisation loop that training stages share: schedule, precision, interval means, a finite loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from hdovd.config import TrainConfig
from hdovd.errors import HdovdError
from hdovd.pipelines.loading import Batches
from hdovd.pipelines.progress import progress

LOG_EVERY = 20  # steps
Sample = TypeVar("Sample")


def fit(model: nn.Module, losses_of: Callable[[list[Sample]], dict[str, Tensor]], batches: Batches[Sample], config: TrainConfig,
        device: torch.device, what: str, *, on_interval: Callable[[dict[str, float]], None] = lambda _: None,
        on_epoch: Callable[[], None] = lambda: None) -> None:
    """Minimise the sum of `losses_of(batch)`, weighted losses by name, for `config.epochs`.

    `on_interval` gets the means since the last call with step, epoch, lr and images_per_s. Raises HdovdError
    if a loss is not finite, before `on_epoch` could save what came of it.
    """
    optimizer = build_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, len(batches), config))
    model.train()
    window: list[dict[str, Tensor]] = []
    since, step, images = time.monotonic(), 0, 0
    with progress(None, what, "step", config.epochs * len(batches)) as bar:
        for epoch in range(1, config.epochs + 1):
            for number, batch in enumerate(batches, start=1):
                step += 1
                images += len(batch)
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = losses_of(batch)
                optimizer.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                if config.clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                window.append({name: loss.detach() for name, loss in losses.items()})
                if step % LOG_EVERY == 0 or number == len(batches):
                    means = _means(window, step, what)
                    rate, lr = images / (time.monotonic() - since), float(schedule.get_last_lr()[0])
                    on_interval({"step": step, "epoch": epoch, "lr": lr, "images_per_s": rate, **means})
                    bar.set_postfix(epoch=epoch, loss=f"{sum(means.values()):.3f}", refresh=False)
                    window, since, images = [], time.monotonic(), 0
                schedule.step()
                bar.update()
            on_epoch()
            since = time.monotonic()


def _means(window: list[dict[str, Tensor]], last_step: int, what: str) -> dict[str, float]:
    """Mean of every loss over the steps up to `last_step`. Raises HdovdError naming the first step that is not finite."""
    table = torch.stack([torch.stack(list(losses.values())) for losses in window]).cpu()
    wrong = (~table.isfinite()).any(dim=1).nonzero()
    if len(wrong):
        first = int(wrong[0])
        values = dict(zip(window[0], table[first].tolist(), strict=True))
        raise HdovdError(f"{what}: the loss is not finite at step {last_step - len(window) + 1 + first}: {values}; "
                         "lower train.lr or set train.clip_norm")
    return dict(zip(window[0], table.mean(dim=0).tolist(), strict=True))


def shuffled(data: Dataset[Sample], config: TrainConfig, device: torch.device,
             on_error: Callable[[HdovdError], None] | None = None, sampler: Sampler[int] | None = None) -> Batches[Sample]:
    """The batches of a training run. `sampler`: another order than a plain shuffle."""
    return Batches(data, config.batch_size, config.workers, device=device, shuffle_seed=config.seed, sampler=sampler, on_error=on_error)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def lr_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The factor on `lr` at 0-based `step`: linear warm-up from 0.001, then steps of 0.1 or a cosine to zero."""
    warmup = config.warmup_iterations
    rise = 1.0 if step >= warmup else 0.001 + 0.999 * step / warmup
    if config.schedule == "step":
        return float(rise * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs))
    return rise * (1 + math.cos(math.pi * min(step / (config.epochs * steps_per_epoch), 1.0))) / 2
