"""Which device a stage runs on, how many processes feed it, the team of processes that torchrun started, and what a run
records of all that.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.process import usable_cores

Model = TypeVar("Model", bound=nn.Module)
PATIENCE = timedelta(hours=3)  # how long the others wait while the first one validates
MOST_WORKERS = 16  # each holds two batches in shared memory


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises HdovdError for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise HdovdError(f"--device {name}: expected auto, cpu or cuda (or cuda:N)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HdovdError(
            f"--device {name}: torch sees no GPU here; use --device cpu, or check the driver with nvidia-smi"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HdovdError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here, which are counted from cuda:0"
        )
    if (
        device.type == "cpu" and torch.get_num_threads() > usable_cores()
    ):  # a container's quota; a program that is not `hdovd.cli.main`
        torch.set_num_threads(usable_cores())
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
        return values.tolist()

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
    local = os.environ["LOCAL_RANK"]
    own = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
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
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
