"""Processes of one training, forked from the test's own, which has imported torch already: fresh ones need seconds for
that.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def played(scene: ModuleType, out: Path, shares: list[int]) -> list[dict[str, Any]]:
    """What the processes of a scene wrote, OUT/RANK.pt: one process for each share, in a group if there are several."""
    out.mkdir()
    work = scene.train if len(shares) == 1 else scene.work
    torch.multiprocessing.start_processes(work, (shares, out), len(shares), start_method="fork")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(len(shares))]
