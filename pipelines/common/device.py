"""Which device a stage runs on, and how many processes feed it."""

import os
from typing import Literal, TypeVar

import torch
from torch import nn

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.threads import usable_cores

Model = TypeVar("Model", bound=nn.Module)
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
        raise HdovdError(f"--device {name}: torch sees no GPU here; use --device cpu, or check the driver with nvidia-smi")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HdovdError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here, which are counted from cuda:0")
    if device.type == "cpu" and torch.get_num_threads() > usable_cores():  # a container's quota; a program that is not `hdovd.cli.main`
        torch.set_num_threads(usable_cores())
    return device


def placed(model: Model, device: torch.device) -> Model:
    """The model on a device, its convolutions in the layout of pictures: a batch has the channels of a pixel side by side (`batching`)."""
    return model.to(device).to(memory_format=torch.channels_last)


def shown(device: torch.device) -> str:
    """What to call it in progress and reports."""
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


def workers_for(device: torch.device, asked: int | None) -> int:
    """`asked`, or what suits the device: on a CPU none, for its cores compute; for a GPU this process's share of the cores, less one,
    MOST_WORKERS at most."""
    if asked is not None:
        return asked
    if device.type != "cuda":
        return 0
    return workers_a_gpu(usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # which torchrun sets


def training_workers(device: torch.device, asked: int | Literal["auto"]) -> int:
    """`asked`, or what keeps a step from waiting for data: for a GPU as `workers_for`; on a CPU one, which prepares the next batch."""
    return asked if asked != "auto" else max(1, workers_for(device, None))


def workers_a_gpu(cores: int, gpus: int) -> int:
    """Worker processes for each of a machine's GPUs."""
    return min(MOST_WORKERS, max(1, cores // gpus - 1))
