"""The precision that a stage computes in: what `auto` stands for on a device, decided here alone.

    device                                              extraction   training
    GPU with bf16 of its own (Ampere and later)         bf16         bf16
    any other GPU                                       fp16         fp32
    CPU with bf16 of its own (AVX-512-BF16, AMX, Arm)   bf16         bf16
    any other CPU                                       fp32         fp32

HDOVD_PRECISION says otherwise. A cache, a run or a network that is there already is gone on with in its own. Inference
(validation, eval, detect, proposals) is in bf16 on a GPU of the first row for a model that was trained in it, else in
fp32: a CPU gains little, and a result is kept exact. What is recorded is never `auto`. torch is imported where it is
needed: the command line names precisions before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.core.errors import HdovdError

if TYPE_CHECKING:
    import torch

    from hdovd.config.recipe import Recipe

SLOW = "many times slower than fp32 (docs/MACHINES.md)"
VARIABLE = "HDOVD_PRECISION"  # what auto stands for instead: for clusters whose nodes differ
X86 = {"avx512_bf16": "AVX-512-BF16", "amx_bf16": "AMX"}


class Precision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """Raises KeyError for auto, which is none."""
        import torch

        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[self]

    @classmethod
    def of(cls, dtype_name: str | None) -> Precision | None:
        """By the name of torch's type, as identities hold it; None for any other."""
        return {"float32": cls.FP32, "bfloat16": cls.BF16, "float16": cls.FP16}.get(str(dtype_name))


def choose(
    asked: Precision | str, device: torch.device, *, training: bool, own: Precision | str | None = None, whose: str = ""
) -> tuple[Precision, str]:
    """What to compute in on a device, which is not auto; and a line: what was chosen and why, or what it costs, empty
    where it was asked for and suits.

    Args:
        own: the precision of what is there already and gone on with, which auto takes; `whose` names it, such as "the
        cache's".

    Raises HdovdError for a precision that the device lacks.
    """
    native, why = native_bf16(device)
    precision, line, source = Precision(asked), "", f"--precision {asked}"
    if precision is Precision.AUTO:
        precision, reason = (Precision(own), f"{whose} own") if own else _auto(device, native, why, training=training)
        line, source = f"precision: {precision}, {reason}", f"precision {precision} ({reason})"
    if precision is Precision.FP16 and (training or device.type == "cpu"):
        raise HdovdError(
            f"{source} "
            + (
                "is not for training, which takes fp32 or bf16"
                if training
                else "needs a GPU: give --device cuda, or --precision fp32"
            )
        )
    if precision is Precision.BF16 and not native:
        line = f"{line or 'note: precision bf16'}; {why}: it is emulated, {SLOW}"
    return precision, line


def _auto(device: torch.device, native: bool, why: str, *, training: bool) -> tuple[Precision, str]:
    """What suits a device, or the environment says, and why."""
    if set_by_user := os.environ.get(VARIABLE):
        if set_by_user not in set(Precision) - {Precision.AUTO}:
            raise HdovdError(f"{VARIABLE}={set_by_user}: expected fp32, bf16 or fp16")
        return Precision(set_by_user), f"by {VARIABLE}"
    other = Precision.FP32 if training or device.type == "cpu" else Precision.FP16
    return Precision.BF16 if native else other, f"chosen: {why}"


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device calculates in bfloat16 itself, and what that is known by."""
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"{torch.cuda.get_device_name(device)} has {'bf16' if native else 'no bf16 of its own'}"
    return cpu_bf16(cpu_features(), torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""))


def cpu_bf16(features: set[str] | None, capability: str, onednn_limit: str) -> tuple[bool, str]:
    """`native_bf16` of a CPU.

    Args:
        features: as `cpu_features`. capability: what torch's own kernels use. onednn_limit: what oneDNN's may use;
        empty for everything.
    """
    if features is None:
        return False, "this CPU does not say whether it has bf16"
    known = [name for feature, name in X86.items() if feature in features]
    if "bf16" in features:  # Arm
        return True, "this CPU has bf16"
    if not known:
        return False, f"this CPU has no bf16 of its own ({capability})"
    limit = onednn_limit.upper()
    if not capability.startswith(("AVX512", "AVX10")) or (
        limit and not any(part in limit for part in ("BF16", "AMX", "AVX10", "DEFAULT"))
    ):
        return False, f"torch is held to {capability} here, without bf16"
    return True, f"this CPU has {' and '.join(known)}"


def cpu_features(file: Path = Path("/proc/cpuinfo")) -> set[str] | None:
    """The instruction sets of this CPU by Linux's names; None where they are not told."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), None)


def settled(recipe: Recipe, device: torch.device, own: str | None = None, whose: str = "") -> tuple[Recipe, str]:
    """The recipe with a precision that is not auto, and the line to say of it. Raises HdovdError."""
    precision, line = choose(recipe.train.precision, device, training=True, own=own, whose=whose)
    return recipe.with_precision(precision.value), line


@contextmanager
def training_products(device: torch.device) -> Iterator[None]:
    """Within, matrix products in float32 on a GPU are TF32's: 10 bits of mantissa, summed in float32, several times as
    fast.

    torch's default has convolutions so, and matrix products not; the torch that the authors trained with (before 1.12)
    had both. It is a setting of the whole process: outside, extraction and inference have torch's default. cuDNN's
    benchmark mode stays off: it tries all algorithms for every new size of a batch, and padded pictures come in many.
    NVIDIA_TF32_OVERRIDE=0 in the environment turns TF32 off.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inference_precision(device: torch.device, recipe: Recipe) -> Precision:
    """Of a model that was trained by `recipe`."""
    fast = device.type == "cuda" and recipe.train.precision == Precision.BF16.value and native_bf16(device)[0]
    return Precision.BF16 if fast else Precision.FP32


def inference_autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    """A context that a model trained by `recipe` detects in."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=inference_precision(device, recipe) is Precision.BF16)
