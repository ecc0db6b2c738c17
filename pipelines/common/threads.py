"""Cores and threads: a process computes on the cores that it may use, and takes none from its neighbours while it
waits.

`limit_threads` sets environment variables that OpenMP reads as torch is loaded, so it has to come before that:
`hdovd.cli.main` calls it. Nothing heavy is imported here.
"""

import os
from math import ceil
from pathlib import Path

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
