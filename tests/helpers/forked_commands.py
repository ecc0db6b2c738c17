"""`hdovd WORDS` in a process forked from this one, which has imported torch already: fresh ones need seconds for that.

`start` is what the fixture `forked` does, and `forked_jobs` has the job pool do it for the commands that it starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hdovd.cli.main import main
from hdovd.pipelines.common import process as processes

OWN = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # what this process may have handlers for
SAME_FOR_ALL = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def start(
    words: Sequence[str], out: int, err: int, *, cwd: Path | None = None, env: Mapping[str, str], session: bool = False
) -> int:
    """The process's id; what it prints goes to the files that are open as `out` and `err`."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        if session:
            os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background job, tests among them, ignores it
        for number in OWN:
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(env)
        os.chdir(cwd or ".")
        sys.argv = ["hdovd", *words]
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Forked:
    """What the job pool needs of a `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], *, stdout: Any, stderr: int, env: Mapping[str, str], **_: object
    ) -> None:
        assert stderr == subprocess.STDOUT
        self.returncode: int | None = None
        self.pid = start(command[3:], stdout.fileno(), stdout.fileno(), env=env, session=True)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ended(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def forked_jobs(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Have jobs that are `python -m hdovd NAME` forked from this process; others are started as ever."""

    def process(command: Sequence[str], **how: Any) -> Any:
        forks = list(command[:3]) == [sys.executable, "-m", "hdovd"] and command[3] in names
        return (_Forked if forks else subprocess.Popen)(command, **how)

    patch.setattr(processes, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": process}))
