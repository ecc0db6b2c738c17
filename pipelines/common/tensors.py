"""Tensors from files that strangers may have written: never unpickled, and no number of theirs believed before it is
checked.

Tensors that hdovd keeps carry a checksum in their own file (safetensors' metadata), so that no kill comes between the
two.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hdovd.core import HdovdError, Unfit, require_readable

CHECKSUM = "sha256"  # in the metadata: `tensors_hash`


def tensors_hash(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """sha256 over names, types, shapes and values of all tensors, and over texts by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    for name, text in sorted((texts or {}).items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], file: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that `load_tensors` can check. `texts`: its metadata, besides the checksum."""
    save_file(dict(tensors), file, {**(texts or {}), CHECKSUM: tensors_hash(tensors, texts)})


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises HdovdError if it cannot be read, or holds others than were written
    (older ones have no checksum).
    """
    require_readable(file)
    try:
        with safe_open(file, "pt") as opened:
            texts = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise HdovdError(f"{file} is damaged ({error}): was it copied whole?") from error
    if texts.pop(CHECKSUM, None) not in (None, tensors_hash(tensors, texts)):
        raise HdovdError(
            f"{file} is damaged: its tensors are not those that were written (by their sha256). Copy it again, or "
            f"train again"
        )
    return tensors


def load_pth(file: Path) -> Any:
    """The content of a .pth or .pt file of tensors and plain containers. Raises Unfit, and HdovdError without the right
    to read it.
    """
    require_readable(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a damaged file fails in many ways; torch's own text advises to switch the protection off
        asks = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise Unfit(
            f"{file} was not loaded: it asks for {asks[1]}, which is no tensor; do not trust it"
            if asks
            else f"{file} was not loaded: it is no file of tensors, or damaged ({type(error).__name__}); get it anew"
        ) from error


def floats(value: Any, what: str) -> np.ndarray:
    """A tensor as float32. Raises Unfit, naming it as `what`."""
    if (
        type(value) not in (Tensor, torch.nn.Parameter)
        or value.layout != torch.strided
        or not value.is_floating_point()
        or value.is_meta
    ):
        raise Unfit(f"{what} is no tensor of floating-point numbers (found a {type(value).__name__})")
    if (
        value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ):  # one number may pose as any amount of memory
        raise Unfit(f"{what} is a tensor of {tuple(value.shape)} numbers over {value.untyped_storage().nbytes()} bytes")
    return np.asarray(value.detach().float().numpy())
