"""What made a run: versions of packages, the commit of the source tree, the machine."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hdovd.pipelines.common.device import shown

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
