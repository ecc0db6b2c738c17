"""Where a stage computes, and in what: its device, the precision that `auto` stands for there, how many processes feed
it, the team of processes that torchrun started, and what a run records of all that.

    device                                              extraction   training
    GPU with bf16 of its own (Ampere and later)         bf16         bf16
    any other GPU                                       fp16         fp32
    CPU with bf16 of its own (AVX-512-BF16, AMX, Arm)   bf16         bf16
    any other CPU                                       fp32         fp32

HDOVD_PRECISION says otherwise. A cache, a run or a network that is there already is gone on with in its own. Inference
(validation, eval, detect, proposals) is in bf16 on a GPU of the first row for a model that was trained in it, else in
fp32: a CPU gains little, and a result is kept exact. What is recorded is never `auto`.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.common.process import usable_cores

Model = TypeVar("Model", bound=nn.Module)
PATIENCE = timedelta(hours=3)  # how long the others wait while the first one validates
MOST_WORKERS = 16  # each holds two batches in shared memory


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises HdovdError for a device that is not there."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if not re.fullmatch(r"cpu(:0)?|cuda(:(0|[1-9]\d?))?", kind):
        raise HdovdError(f"--device {name}: expected auto, cpu or cuda (or cuda:N)")
    device, gpus = torch.device(kind), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise HdovdError(
            f"--device {name}: torch sees {gpus or 'no'} GPUs here, which are counted from cuda:0; use --device cpu, "
            f"or check the driver with nvidia-smi"
        )
    return device


def placed(model: Model, device: torch.device) -> Model:
    """The model on a device, its convolutions in the layout of pictures: a batch has the channels of a pixel side by
    side (`batching`).
    """
    return model.to(device).to(memory_format=torch.channels_last)


def shown(device: torch.device) -> str:
    """What to call it in progress and reports."""
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


def workers_for(device: torch.device, asked: int | None) -> int:
    """`asked`, or what suits the device: on a CPU none, for its cores compute; for a GPU this process's share of the
    cores, less one, MOST_WORKERS at most.
    """
    if asked is not None:
        return asked
    if device.type != "cuda":
        return 0
    return workers_a_gpu(usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # which torchrun sets


def training_workers(device: torch.device, asked: int | Literal["auto"]) -> int:
    """`asked`, or what keeps a step from waiting for data: for a GPU as `workers_for`; on a CPU one, which prepares the
    next batch.
    """
    return asked if asked != "auto" else max(1, workers_for(device, None))


def workers_a_gpu(cores: int, gpus: int) -> int:
    """Worker processes for each of a machine's GPUs."""
    return min(MOST_WORKERS, max(1, cores // gpus - 1))


VARIABLE = "HDOVD_PRECISION"  # what auto stands for instead: for clusters whose nodes differ
NATIVE = {"avx512_bf16": "AVX-512-BF16", "amx_bf16": "AMX", "bf16": "bf16"}  # by Linux's names; the last one is Arm's


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
        line = (
            f"{line or 'note: precision bf16'}; {why}: it is emulated, many times slower than fp32 (docs/MACHINES.md)"
        )
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
    known = [name for feature, name in NATIVE.items() if feature in (features or ())]
    if not known:
        unknown = "this CPU does not say whether it has bf16"
        return False, unknown if features is None else f"this CPU has no bf16 of its own ({capability})"
    limited = onednn_limit and not any(p in onednn_limit.upper() for p in ("BF16", "AMX", "AVX10", "DEFAULT"))
    if "bf16" not in known and (limited or not capability.startswith(("AVX512", "AVX10"))):
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
    return torch.autocast(device.type, torch.bfloat16, enabled=inference_precision(device, recipe) is Precision.BF16)


@dataclass(frozen=True, slots=True)
class Team:
    """This process among all of a run, each with its part of every batch. `control`: a gloo group beside NCCL's, for
    what is decided on the CPU.
    """

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
        found: list[int] = values.tolist()
        return found

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
    """Join the others, if torchrun started several; on GPUs each has its own. Raises HdovdError for a device that is
    not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Team(0, 1, pick_device(device))
        return
    own_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    own = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if own.type == "cuda" else None
        yield Team(dist.get_rank(), world, own, control)
    finally:
        dist.destroy_process_group()


PACKAGES = ("hdovd", "torch", "torchvision", "numpy", "zarr", "webdataset", "timm", "pycocotools", "pydantic", "pillow")


def provenance(device: torch.device, processes: int) -> dict[str, Any]:
    """Of this process, now. `git` is None where hdovd does not lie in a repository of its own."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": git_commit(),
        "versions": versions(),
        "device": shown(device),
        "processes": processes,
        "host": platform.node(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def git_commit() -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the source tree that hdovd is imported from; None for one that is not in git."""
    file = Path(__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a virtual environment within somebody's repository is not ours
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
