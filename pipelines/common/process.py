"""Processes: the cores that this one may use, the signals that ask it to stop, and commands that it runs in others, so
many at a time, each with its log file, all of them stopped when this one is.

`limit_threads` sets environment variables that OpenMP reads as torch is loaded, so it has to come before that:
`hdovd.cli.main` calls it. Nothing heavy is imported here. SIGTERM and SIGUSR1 (a SLURM preemption, or its warning of
the time limit) and Ctrl-C are heard between two steps.
"""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType

from hdovd.pipelines.common.atomic_write import writing

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: of its affinity (taskset, SLURM's cpusets), and not more than a cgroup's quota
    (containers).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ceil(min(affinity, cgroup_quota())))


def cgroup_quota(table: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> float:
    """Cores' worth of time that this process's cgroup and those around it allow it, of version 1 or 2; infinity without
    a limit.
    """
    quotas = [float("inf")]
    with suppress(OSError):  # not Linux
        for line in table.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                inner = Path(path.lstrip("/"))
                # a container may see its own as the root
                quotas += [_quota(root / controllers / group) for group in (inner, *inner.parents)]
    return min(quotas)


def _quota(group: Path) -> float:
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):  # of version 2, and of 1
        with suppress(OSError, ValueError):
            quota, period = " ".join((group / name).read_text() for name in files).split()
            return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    return float("inf")


def limit_threads() -> str | None:
    """Set OMP_NUM_THREADS to this process's share of the cores, and OMP_WAIT_POLICY to passive, where the user has not.

    A thread that waits for the others otherwise spins, which costs little on cores of its own and most of the time on
    shared ones. Returns a warning for more threads than cores.
    """
    cores = usable_cores()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    asked = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))
    if asked.isdigit() and int(asked) > cores:
        return f"note: OMP_NUM_THREADS={asked}, and this process may use {cores} core{'s' if cores > 1 else ''}: more threads are slower"  # noqa: E501
    return None


PREEMPTED = 75  # "temporary failure; the user is invited to retry" (sysexits.h): job files ask for it
INTERRUPTED = 130  # as a shell says of Ctrl-C


class StopSignal:
    """`with StopSignal() as stop:` ... `stop.signals` are the signals that came, and `stop.received` is the last, or
    0."""

    def __init__(self, *, interrupts: bool = False) -> None:
        """`interrupts`: a second Ctrl-C stops at once, a terminal that closes too, and signals that this process was
        started to ignore (background jobs of scripts) are heard.
        """
        self.signals: list[int] = []
        self._numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *(() if interrupts else (signal.SIGHUP,)))
        self._interrupts = interrupts
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def received(self) -> int:
        return self.signals[-1] if self.signals else 0

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            heard = [
                number for number in self._numbers if self._interrupts or signal.getsignal(number) != signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self._interrupts and number == signal.SIGINT and self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)


def exit_code(number: int) -> int:
    """Of a command that saved its work because signal `number` came."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


POLL_S = 0.1
PATIENCE_S = 120.0  # for a process that was asked to end: it may be saving its state
Process = subprocess.Popen[bytes]
# at its end the command of the job that was the last, its exit code, and seconds
Running = Generator[Process, None, tuple[tuple[str, ...], int, float]]


@dataclass(frozen=True, slots=True)
class Job:
    """Command lines, run one after the other until one fails. Their output is added to `log`."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    log: Path


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


def log_end(log: Path, most: int = 8) -> str:
    """What a log ends with, to be said of a job that failed, without empty lines; a progress bar's last state is a
    line.
    """
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join([f"{log} ends with", *(f"    {line}" for line in lines[-most:])])


def _run(job: Job, environment: Mapping[str, str], keep_open: tuple[int, ...]) -> Running:
    """The process that runs, as often as it is asked for while there is one; then how the job ended."""
    began = time.monotonic()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for command in job.commands:
        with writing(job.log), job.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            # a session of its own: Ctrl-C in the terminal reaches this process alone, which then lets them save
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
                pass_fds=keep_open,
            )
        while process.poll() is None:
            yield process
        if process.returncode:
            break
    return command, process.returncode, time.monotonic() - began


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
