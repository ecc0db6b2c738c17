"""A linear layer for widths of many thousands, whose three products on a CPU are oneDNN's in place of the BLAS that torch has.

There it is the better half of a step of training. docs/TRAINING.md has figures. Called by `mixing`.
M rows, I channels in, O channels out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Torch has no public name for oneDNN's product in float32; its compiler calls this operator (torch 2.6 to 2.15).
HAS_PRODUCT = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class WideLinear(nn.Linear):
    """`nn.Linear` with a bias, by its state and by its values but for rounding. Other products where it trains in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O)."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if HAS_PRODUCT and trains and plain and len(x):
            out: Tensor = _Products.apply(x, self.weight, self.bias)
            return out
        return super().forward(x)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _product(gradient, weight.t()), _product(gradient.t(), x.t()), gradient.sum(dim=0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
