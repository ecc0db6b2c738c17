"""Which device a stage runs on, and how many processes feed it."""

import os

import torch

from hdovd.errors import HdovdError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises HdovdError for CUDA without a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise HdovdError(f"--device {name}: torch sees no GPU here; use --device cpu, or check the driver with nvidia-smi")
    try:
        return torch.device(name)
    except RuntimeError:
        raise HdovdError(f"--device {name}: expected auto, cpu or cuda (or cuda:N)") from None


def shown(device: torch.device) -> str:
    """What to call it in progress and reports."""
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


def workers_for(device: torch.device, asked: int | None) -> int:
    """`asked`, or what suits the device: on a CPU none, for its cores compute; for a GPU this process's share of the cores, less one."""
    if asked is not None:
        return asked
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)  # which torchrun sets
