"""Commands in processes of their own, so many at a time, each with its log file; all of them stopped when this process
is.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hdovd.pipelines.common.atomic_write import writing
from hdovd.pipelines.common.process import StopSignal

POLL_S = 0.1
PATIENCE_S = 120.0  # for a process that was asked to end: it may be saving its state
Process = subprocess.Popen[bytes]
Ended = tuple[tuple[str, ...], int, float]  # of a job: the command that was the last, its exit code, seconds
Running = Generator[Process, None, Ended]


@dataclass(frozen=True, slots=True)
class Job:
    """Command lines, run one after the other until one fails. Their output is added to `log`."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path


def stop_signals() -> StopSignal:
    """Collects the signals that ask this process to end; after the second, children are killed."""
    return StopSignal(
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    )  # the last: SLURM's warning of the time limit


def run_jobs(
    jobs: Iterable[Job],
    places: Sequence[Mapping[str, str]],
    on_end: Callable[[Job, tuple[str, ...], int, float], None],
    stop: StopSignal,
    keep_open: Sequence[int] = (),
) -> None:
    """Run all jobs, as many at a time as there are `places`: environment variables for the job that runs there.

    `on_end`: is told of a job that ran to its end, with the command that was the last, its exit code, and seconds.

    Returns when all have ended or `stop` has a signal; no process of them is left then. `keep_open`: file descriptors
    that the processes hold too, such as a lock's.
    """
    waiting, running, processes = iter(jobs), dict[int, tuple[Job, Running]](), dict[int, Process]()
    try:
        while not stop.signals:
            for place, job in zip([p for p in range(len(places)) if p not in running], waiting, strict=False):
                running[place] = job, _run(job, places[place], tuple(keep_open))
            if not running:
                break
            count = len(running)
            for place, (job, processes_of_job) in list(running.items()):
                try:
                    processes[place] = next(processes_of_job)
                except StopIteration as end:
                    del running[place]
                    on_end(job, *end.value)
            if len(running) == count:  # else there is a place for the next one
                time.sleep(POLL_S)
    finally:
        _end([process for process in processes.values() if process.poll() is None], stop)


def log_end(log: Path) -> str:
    """What a log ends with, to be said of a job that failed."""
    return "\n".join([f"{log} ends with", *(f"    {line}" for line in last_lines(log))])


def last_lines(log: Path, most: int = 8) -> list[str]:
    """The end of a log, without empty lines; a progress bar's last state is a line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()][-most:]


def _run(job: Job, environment: Mapping[str, str], keep_open: tuple[int, ...]) -> Running:
    """The process that runs, as often as it is asked for while there is one; then how the job ended."""
    began = time.monotonic()
    for command in job.commands:
        process = _start(command, job.log, environment, keep_open)
        while process.poll() is None:
            yield process
        if process.returncode:
            break
    return command, process.returncode, time.monotonic() - began


def _start(command: tuple[str, ...], file: Path, environment: Mapping[str, str], keep_open: tuple[int, ...]) -> Process:
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file), file.open("ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        # a session of its own: Ctrl-C in the terminal reaches this process alone, which then lets them save
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
            pass_fds=keep_open,
        )


def _end(processes: Sequence[Process], stop: StopSignal) -> None:
    """SIGTERM to all, then SIGKILL to those, with their children, that are still there after a while or a second
    signal.
    """
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.terminate()
    while any(p.poll() is None for p in processes) and len(stop.signals) < 2 and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
