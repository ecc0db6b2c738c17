"""Proposing in a process of its own, for tests that kill it. `play(job, ...)` forks, and returns the exit code and what
was printed.

`kill_at`: the training step of the network, or with `rehearsal` of the rehearsal, after which the process sends itself
`signal`; `kill_in_part`: so that this part is not
written.
"""

from __future__ import annotations

import os
import signal as signals
from pathlib import Path
from typing import Any

import torch
from forked_group import ranks

from hdovd.core import Stopped, lines_to
from hdovd.pipelines.proposals import propose as proposal_parts
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.propose import propose
from hdovd.pipelines.training.hooks import RunHooks
from hdovd.pipelines.training.loop import Loop

PART = 8  # images of a part here


def play(job: ProposeConfig, log: Path, *, processes: int = 1, **kill: int) -> tuple[int, str]:
    """The first process's exit code, negative for a signal, and what was printed."""
    return ranks(lambda: _run(job, **kill), log, processes)


def _run(
    job: ProposeConfig, kill_at: int = -1, kill_in_part: int = -1, signal: int = signals.SIGKILL, rehearsal: int = 0
) -> int:
    torch.set_num_threads(1)
    proposal_parts.IMAGES = PART
    told, write = RunHooks.step, proposal_parts.Parts.write

    def step(self: RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == kill_at and ("rehearsal" in self.run.path.name) == bool(rehearsal):
            os.kill(os.getpid(), signal)
        told(self, loop)

    def write_or_die(self: proposal_parts.Parts, part: int, *found: Any, **told: Any) -> None:
        if part == kill_in_part:
            os.kill(os.getpid(), signal)
        write(self, part, *found, **told)

    RunHooks.step = step  # type: ignore[method-assign]
    proposal_parts.Parts.write = write_or_die  # type: ignore[method-assign]
    try:
        with lines_to(lambda line: os.write(1, f"{line}\n".encode())):  # not to what pytest has as sys.stdout
            propose(job)
    except Stopped as stopped:
        os.write(2, f"{stopped}\n".encode())
        return stopped.code
    return 0
