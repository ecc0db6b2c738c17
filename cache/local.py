"""A cache in a folder of a file system, shared or not.

Locks on files, which the system lets go when their process dies, however it dies.

A cache's folder by its path or URL.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from hdovd.cache.store import Folder
from hdovd.core.errors import HdovdError, system_reason

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


CLAIMS = ".claims"
CLAIM_WAIT_S = 3600.0  # no longer a wait for another process: it may hang, or be on a machine that is gone


class LocalFolder(Folder):
    """A folder of a file system, shared or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        try:
            with self.path(name).open("rb") as file:
                first, last, _ = slice(start, stop).indices(os.fstat(file.fileno()).st_size)
                file.seek(first)
                return file.read() if stop is None else file.read(max(0, last - first))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise HdovdError(f"{self.path(name)} cannot be read: {system_reason(error)}") from error

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        target = self.path(name)
        if exclusive and target.exists():
            return False
        partial = target.parent / partial_name(uuid.uuid4().hex[:8])
        try:
            _make(target.parent)
            with partial.open("wb") as file:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells `sweep` that the writer lives
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if exclusive:
                    _link(partial, target)
                else:
                    os.replace(partial, target)
            _sync(target.parent)
        except FileExistsError:
            return False
        except OSError as error:
            raise HdovdError(
                f"{target} cannot be written: {system_reason(error)}. What was finished before is kept: then run the "
                f"same command again"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        self.path(prefix)
        found, root = {}, os.path.join(self.root, "")
        for folder, folders, files in os.walk(root + prefix):  # texts: a Path of every file more than doubles the time
            folders[:] = [f for f in folders if f != CLAIMS]
            for file in files:
                if not file.startswith(PARTIAL):
                    path = os.path.join(folder, file)
                    with contextlib.suppress(FileNotFoundError):
                        found[path.removeprefix(root)] = os.stat(path).st_size
        return dict(sorted(found.items()))

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def modified(self, name: str) -> float:
        return self.path(name).stat().st_mtime

    def delete(self, name: str) -> None:
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                _sync(path.parent)

    def path(self, name: str) -> Path:
        """Raises HdovdError for a name that leads out of the folder: some are read from files."""
        if ".." in name.split("/") or name.startswith("/") or "\0" in name:
            raise HdovdError(f"{self.root}: {name[:200]!r} is no name of an object in it")
        return self.root / name

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        file, locks = self.root / CLAIMS / name.replace("/", "-"), True
        try:
            _make(file.parent)
            handle = lock(file, CLAIM_WAIT_S if wait else 0)
        except OSError:  # no locks here, or no room: then `write` says what is wrong
            handle, locks = None, False
        try:
            yield handle is not None or wait or not locks
        finally:
            if handle is not None:
                with contextlib.suppress(OSError):
                    unlock(file, handle)

    def sweep(self) -> list[str]:
        swept = []
        for path in sorted(self.root.rglob(f"{PARTIAL}*")):
            if is_stale(path):
                path.unlink(missing_ok=True)
                swept.append(path.relative_to(self.root).as_posix())
        for path in sorted((self.root / CLAIMS).glob("*")):
            with contextlib.suppress(OSError):
                if (handle := lock(path, 0)) is not None:
                    unlock(path, handle)
        return swept


def _link(partial: Path, target: Path) -> None:
    """Give a file its name unless that is taken. Raises FileExistsError."""
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if target.exists():  # a file system without hard links
            raise FileExistsError from error
        os.replace(partial, target)


def _make(folder: Path) -> None:
    """Make a folder and its parents, each durable."""
    if folder.is_dir():
        return
    _make(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync a folder
        pass
    finally:
        os.close(handle)


def open_folder(url: str | Path) -> Folder:
    """A local path, or file://, s3://, gs:// and whatever else fsspec knows. Raises HdovdError for a file:// URL of
    another machine.
    """
    text = str(url)
    if "://" not in text:
        return LocalFolder(Path(text))
    if text.startswith("file://"):
        host, slash, path = text.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise HdovdError(f"{text}: expected file:///PATH with three slashes, or the path alone")
        return LocalFolder(Path(unquote(slash + path)))
    from hdovd.cache.remote import RemoteFolder

    return RemoteFolder(text)
