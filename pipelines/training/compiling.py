"""`train.compile`: the backbone and its pyramid as code that torch compiles for the machine."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hdovd.core.errors import HdovdError


def compile_backbone(backbone: nn.Module, device: torch.device, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a network in place at its first batch, for batches of all sizes; names in its state stay as they are.

    It is one graph without gaps: what torch cannot compile is an error in the first step (`told_shortly`), and never
    quietly left as it is. SyncBatchNorm is the exception, which talks to other processes: what lies between two of them
    is compiled. The rest of a detector (proposals, RoIs, matching) has as many rows as it finds, which differ from step
    to step, and is not compiled.

    Raises HdovdError if there is no compiler for the device.
    """
    number = float(time.time_ns())  # in the code: what was compiled before does not serve
    try:
        torch.compile(lambda rows: rows * number, backend=backend)(torch.ones(8, device=device))
    except Exception as error:
        need = "Triton (pip install triton)" if device.type == "cuda" else "a C++ compiler (apt-get install g++)"
        raise HdovdError(
            f"train.compile = true: torch cannot compile for {device.type} here ({_first_line(error)}); it needs "
            f"{need}. Without it, train with train.compile=false"
        ) from error
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    backbone.compile(backend=backend, dynamic=True, fullgraph=not synced)


@contextmanager
def told_shortly() -> Iterator[None]:
    """An error of torch's compiler within is told in a line, as HdovdError."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise HdovdError(
            f"train.compile = true: torch cannot compile the backbone ({_first_line(error)}); train with "
            f"train.compile=false"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
