"""Exponential moving average of a model's weights, `train.ema`: what is validated and kept of a run."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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
        self._weights = _weights(self._averaged)

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        live = _weights(self._live)
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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are averaged, by name."""
    memories = tuple(getattr(model, "training_parts", ()))
    buffers = {
        name: value
        for name, value in model.named_buffers()
        if value.is_floating_point() and not name.startswith(memories)
    }
    return {**dict(model.named_parameters()), **buffers}
