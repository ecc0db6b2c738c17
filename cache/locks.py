"""Locks on files, which the system lets go when their process dies, however it dies."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial-"  # how names of files begin that are being written: .partial-HOST-PID-RANDOM
STALE_AFTER_S = 24 * 3600.0  # another machine's partial file is a dead process's after this time
POLL_S = 0.1

_held: set[IO[Any]] = set()


def lock(file: Path, patience_s: float) -> IO[Any] | None:
    """The file, made, open and locked; None if another process has it and keeps it for `patience_s`. Raises OSError
    without locks.

    `unlock` deletes it. A child of this process (a DataLoader's) does not hold it: it may live on when this process is
    killed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        handle = file.open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_nlink:
                _held.add(handle)
                return handle
            handle.close()  # its last owner deleted it after we had opened it
        except BlockingIOError:
            handle.close()
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)
        except OSError:
            handle.close()
            raise


def unlock(file: Path, handle: IO[Any]) -> None:
    """Delete a locked file, while nobody else can have locked it, and let it go."""
    try:
        file.unlink(missing_ok=True)
    finally:
        _held.discard(handle)
        handle.close()


def partial_name(random: str) -> str:
    """The name of a file that this process is writing."""
    return f"{PARTIAL}{_host()}-{os.getpid()}-{random}"


def is_stale(path: Path) -> bool:
    """Whether the writer of a partial file is dead: no process of this machine (of another one: a day has passed), and
    no lock on it.

    The lock decides where containers share a machine's name but not its processes.
    """
    try:
        host, pid = path.name.removeprefix(PARTIAL).split("-")[:2]
        if time.time() - path.stat().st_mtime <= STALE_AFTER_S and (host != _host() or _lives(int(pid))):
            return False
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, ValueError, PermissionError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _host() -> str:
    return socket.gethostname().replace("-", "_")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _let_go_in_child() -> None:
    for handle in _held:
        handle.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
