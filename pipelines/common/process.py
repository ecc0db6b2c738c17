"""This process: the cores that it may use, and the signals that ask it to stop.

`limit_threads` sets environment variables that OpenMP reads as torch is loaded, so it has to come before that:
`hdovd.cli.main` calls it. Nothing heavy is imported here. SIGTERM and SIGUSR1 (a SLURM preemption, or its warning of
the time limit) and Ctrl-C are heard between two steps.
"""

import os
import signal
import threading
from math import ceil
from pathlib import Path
from types import FrameType

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
    try:
        lines = [line.split(":", 2) for line in table.read_text().splitlines()]
    except OSError:  # not Linux
        return float("inf")
    quotas = [float("inf")]
    for _, controllers, path in lines:
        if controllers == "" or "cpu" in controllers.split(","):
            base = root if controllers == "" else root / controllers
            inner = Path(path.lstrip("/"))
            quotas += [
                _quota(base / group) for group in (inner, *inner.parents)
            ]  # a container may see its own as the root
    return min(quotas)


def _quota(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return float("inf")
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)


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

    def __init__(self, *numbers: int, interrupts: bool = False) -> None:
        """`numbers`: the signals to hear; by default SIGTERM, SIGUSR1 and SIGINT. `interrupts`: a second Ctrl-C stops
        at once, and signals that this process was started to ignore (nohup, background jobs of scripts) are heard too.
        """
        self.signals: list[int] = []
        self._numbers, self._interrupts = numbers or (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), interrupts
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
