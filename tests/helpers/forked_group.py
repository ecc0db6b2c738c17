"""Processes of one training, forked from the test's own, which has imported torch already: fresh ones need seconds for
that.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def played(scene: ModuleType | SimpleNamespace, out: Path, shares: list[int]) -> list[dict[str, Any]]:
    """What the processes of a scene wrote, OUT/RANK.pt: one process for each share, in a group if there are several."""
    out.mkdir()
    work = scene.train if len(shares) == 1 else scene.work
    torch.multiprocessing.start_processes(work, (shares, out), len(shares), start_method="fork")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(len(shares))]


def ranks(body: Callable[[], int], log: Path, processes: int = 1) -> tuple[int, str]:
    """What torchrun starts: processes that know their rank. The first one's exit code, negative for a signal, and what
    all of them printed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        started.append(os.fork())
        if started[-1] == 0:
            code = 99
            try:
                os.environ.update({} if processes == 1 else address | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                for number in (1, 2):
                    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
                sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # pytest has its own
                code = body()
            except BaseException:
                traceback.print_exc(file=open(log, "a"))  # noqa: SIM115 - the process ends here
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    return codes[0], log.read_text()
