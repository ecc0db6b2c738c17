"""Proposing in a process of its own, for tests that kill it. `play(job, ...)` forks, and returns the exit code and what
was printed.

`kill_at`: the training step after which the process sends itself `signal`; `kill_in_part`: so that this part is not
written.
"""

from __future__ import annotations

import os
import signal as signals
import socket
import traceback
from pathlib import Path
from typing import Any

import torch

from hdovd.core.errors import Stopped
from hdovd.pipelines.proposals import parts as proposal_parts
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.propose import propose
from hdovd.pipelines.training.hooks import SavingHooks
from hdovd.pipelines.training.loop import Loop

PART = 8  # images of a part here


def play(job: ProposeConfig, log: Path, *, processes: int = 1, **kill: int) -> tuple[int, str]:
    """The first process's exit code, negative for a signal."""
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
                code = _run(job, **kill)
            except BaseException:
                traceback.print_exc(file=open(log, "a"))  # noqa: SIM115 - the process ends here
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    return codes[0], log.read_text()


def _run(job: ProposeConfig, kill_at: int = -1, kill_in_part: int = -1, signal: int = signals.SIGKILL) -> int:
    torch.set_num_threads(1)
    proposal_parts.IMAGES = PART
    told, write = SavingHooks.step, proposal_parts.Parts.write

    def step(self: SavingHooks, loop: Loop[Any]) -> None:
        if loop.step_number == kill_at:
            os.kill(os.getpid(), signal)
        told(self, loop)

    def write_or_die(self: proposal_parts.Parts, number: int, part: proposal_parts.Part) -> None:
        if number == kill_in_part:
            os.kill(os.getpid(), signal)
        write(self, number, part)

    SavingHooks.step = step  # type: ignore[method-assign]
    proposal_parts.Parts.write = write_or_die  # type: ignore[method-assign]
    try:
        propose(
            job, lambda line: os.write(1, f"{line}\n".encode()) and None
        )  # not to what pytest put in place of sys.stdout
    except Stopped as stopped:
        os.write(2, f"{stopped}\n".encode())
        return stopped.code
    return 0
