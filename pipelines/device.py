"""Which device a stage runs on."""

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
