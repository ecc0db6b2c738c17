"""Hold this process to a little memory, page cache included, to measure what happens when data do not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup/memory")  # version 1


@contextmanager
def memory_limit(count: int) -> Iterator[None]:
    """What this process allocates and reads from now on fits in `count` bytes; what it holds already is not counted.

    Raises SystemExit where there is no memory controller of cgroup version 1, or this user may not use it.
    """
    try:
        own = next(
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.split(":")[1] == "memory"
        )
        here = CGROUPS / own.lstrip("/")
        group = here / f"hdovd-{os.getpid()}"
        group.mkdir()
    except (OSError, StopIteration) as error:
        raise SystemExit(
            f"memory cannot be limited here ({error!r}): this needs Linux, cgroup version 1 with the memory "
            f"controller, and root"
        ) from error
    try:
        (group / "memory.limit_in_bytes").write_text(str(count))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (here / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
