"""Tensors from files that strangers may have written: never unpickled, and no number of theirs believed before it is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdovd.errors import require_readable


class Unfit(Exception):
    """Why a file, or a value in it, cannot be taken."""


def load_pth(file: Path) -> Any:
    """The content of a .pth or .pt file of tensors and plain containers. Raises Unfit, and HdovdError without the right to read it."""
    require_readable(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; torch's own text advises to switch the protection off
        asks = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise Unfit(f"{file} was not loaded: it asks for {asks[1]}, which is no tensor; do not trust it" if asks else
                    f"{file} was not loaded: it is no file of tensors, or damaged ({type(error).__name__}); get it anew") from error


def floats(value: Any, what: str) -> np.ndarray:
    """A tensor as float32. Raises Unfit, naming it as `what`."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
        raise Unfit(f"{what} is no tensor of floating-point numbers (found a {type(value).__name__})")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # one number may pose as any amount of memory
        raise Unfit(f"{what} is a tensor of {tuple(value.shape)} numbers over {value.untyped_storage().nbytes()} bytes")
    rows: np.ndarray = value.detach().float().numpy()
    return rows
