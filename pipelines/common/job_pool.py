"""Commands in processes of their own, so many at a time, each with its log file; all of them stopped when this process
is.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hdovd.pipelines.common.atomic_write import writing
from hdovd.pipelines.common.process import StopSignal

POLL_S = 0.1
PATIENCE_S = 120.0  # for a process that was asked to end: it may be saving its state


@dataclass(frozen=True, slots=True)
class Job:
    """Command lines, run one after the other until one fails. Their output is added to `log`."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that ran to its end: the exit code of the command that was the last."""

    job: Job
    command: tuple[str, ...]
    code: int
    seconds: float


def stop_signals() -> StopSignal:
    """Collects the signals that ask this process to end; after the second, children are killed."""
    return StopSignal(
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    )  # the last: SLURM's warning of the time limit


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[Mapping[str, str]],
    on_end: Callable[[Ended], None],
    stop: StopSignal,
    keep_open: Sequence[int] = (),
) -> None:
    """Run all jobs, as many at a time as there are `places`: environment variables for the job that runs there.

    Returns when all have ended or `stop` has a signal; no process of them is left then. `keep_open`: file descriptors
    that the processes hold too, such as a lock's.
    """
    waiting, running = list(jobs), dict[int, _Running]()
    try:
        while (waiting or running) and not stop.signals:
            for place in range(len(places)):
                if place not in running and waiting:
                    running[place] = _Running(waiting.pop(0), places[place], keep_open)
            ended = {place: result for place, job in running.items() if (result := job.poll()) is not None}
            for place, result in ended.items():
                del running[place]
                on_end(result)
            if not ended:
                time.sleep(POLL_S)
    finally:
        _end([job.process for job in running.values()], stop)


def last_lines(log: Path, most: int = 8) -> list[str]:
    """The end of a log, without empty lines; a progress bar's last state is a line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-most:]


class _Running:
    def __init__(self, job: Job, environment: Mapping[str, str], keep_open: Sequence[int]) -> None:
        self.job, self.began = job, time.monotonic()
        self.environment, self.keep_open = environment, tuple(keep_open)
        self.left = list(job.commands)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self) -> None:
        self.command = self.left.pop(0)
        with writing(self.job.log), self.job.log.open("ab") as log:
            log.write(f"$ {shlex.join(self.command)}\n".encode())
            log.flush()
            # a session of its own: Ctrl-C in the terminal reaches this process alone, which then lets them save
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                start_new_session=True,
                pass_fds=self.keep_open,
            )

    def poll(self) -> Ended | None:
        """The result, if the last command or one that failed has ended; starts the next one."""
        code = self.process.poll()
        if code == 0 and self.left:
            self._next()
            return None
        return None if code is None else Ended(self.job, self.command, code, time.monotonic() - self.began)


def _end(processes: Sequence[subprocess.Popen[bytes]], stop: StopSignal) -> None:
    """SIGTERM to all, then SIGKILL to those, with their children, that are still there after a while or a second
    signal.
    """
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    while (
        any(process.poll() is None for process in processes) and len(stop.signals) < 2 and time.monotonic() < deadline
    ):
        time.sleep(POLL_S)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
