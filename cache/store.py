"""Where a cache's bytes lie: a folder of a file system, shared or not, or an object store. One contract for both,
`Folder`; and one error for damage.

Names are relative, with slashes. A write is whole or absent under its name, and durable when it returns. Claims of a
folder are locks on files, which the system lets go when their process dies, however it dies.

Object stores are reached through fsspec: s3://, gs:// and whatever else it knows. Endpoint and credentials come from
where the client looks for them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) or from fsspec's own configuration
(FSSPEC_S3, ~/.config/fsspec). A PUT is whole or absent, so are writes; without locks, claims are not kept, and two
workers may do the same part.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from hdovd.cache.hub import is_hub, pulled
from hdovd.cache.identity import hash_file
from hdovd.core import HdovdError, system_reason

REPAIR = "hdovd cache verify --repair marks it as missing, to be made again"


@contextmanager
def naming_damage(place: str, advice: str = REPAIR) -> Iterator[None]:
    """Turns whatever parsing an object raises (of JSON, Zarr, numpy: each has its own) into HdovdError that names the
    object.

    FileNotFoundError passes: only the caller knows what it means that there is no such object.
    """
    try:
        yield
    except (HdovdError, FileNotFoundError):
        raise
    except Exception as error:
        kind = {ValueError: "", KeyError: "it lacks "}.get(type(error), f"{type(error).__name__}: ")
        raise HdovdError(f"{place} is damaged ({kind}{' '.join(str(error).split())[:200]}): {advice}") from error


class Folder(ABC):
    """A tree of named objects."""

    url: str

    @abstractmethod
    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """An object, or its bytes from `start` (from the end if negative) to `stop`. Raises FileNotFoundError if there
        is none.
        """

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def sha256(self, name: str) -> str:
        """The checksum of an object, of a local file in blocks. Raises FileNotFoundError if there is none."""
        path = self.path(name)
        return hashlib.sha256(self.read(name)).hexdigest() if path is None else hash_file(path)

    @abstractmethod
    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        """Write an object; with `exclusive` only if there is none. True if written. Raises HdovdError if it cannot
        be."""

    @abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Size in bytes of every object below a prefix (a folder), by name, sorted; files being written are left
        out."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def modified(self, name: str) -> float:
        """When an object was written, seconds since the epoch."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object, or everything below a folder; what is not there is deleted already."""

    def path(self, name: str) -> Path | None:
        """The local file of an object, or None where there is none to map."""
        return None

    @contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """True while this process alone may work on `name`; False if another does, unless told to `wait` (CLAIM_WAIT_S
        at most).

        Only saves double work: results are the same bytes, so a store without locks is safe too.
        """
        yield True

    def stale(self) -> dict[str, int]:
        """Sizes of the files that processes which are dead left half-written."""
        return {}

    def claimed(self) -> set[str]:
        """What processes have claimed right now, as far as locks tell: names with - for /."""
        return set()

    def sweep(self) -> list[str]:
        """Delete what processes that are dead left half-written, and their claims; returns the names."""
        names = list(self.stale())
        for name in names:
            self.delete(name)
        self.claimed()
        return names


PARTIAL = ".partial-"  # how names of files begin that are being written: .partial-HOST-PID-RANDOM
STALE_AFTER_S = 24 * 3600.0  # another machine's partial file is a dead process's after this time
POLL_S = 0.1

_held: set[IO[Any]] = set()


@contextmanager
def locked(file: Path, patience_s: float) -> Iterator[bool]:
    """Whether the file, made, is locked while this lasts: False if another process has it and keeps it for
    `patience_s`; True where there are no locks. It is deleted then.

    A child of this process (a DataLoader's) does not hold it: it may live on when this process is killed.
    """
    try:
        _make(file.parent)
        handle = _lock(file, patience_s)
    except OSError:  # no locks here, or no room: then `write` says what is wrong
        yield True
        return
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                file.unlink()  # while nobody else can have locked it
            _held.discard(handle)
            handle.close()


def _lock(file: Path, patience_s: float) -> IO[Any] | None:
    """The file, open and locked, or None. Raises OSError without locks."""
    deadline = time.monotonic() + patience_s
    while True:
        handle = file.open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_nlink:  # else its last owner deleted it after we had opened it
                _held.add(handle)
                return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)
        finally:
            if handle not in _held:
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
        if time.time() - path.stat().st_mtime <= STALE_AFTER_S and (
            host != _host() or Path(f"/proc/{int(pid)}").exists()
        ):
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
        with locked(self.root / CLAIMS / name.replace("/", "-"), CLAIM_WAIT_S if wait else 0) as mine:
            yield mine or wait

    def stale(self) -> dict[str, int]:
        found = {}
        for path in sorted(self.root.rglob(f"{PARTIAL}*")):
            with contextlib.suppress(FileNotFoundError):  # others sweep too
                if path.is_file() and is_stale(path):
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def claimed(self) -> set[str]:
        held = set()
        for path in (self.root / CLAIMS).glob("*"):
            with locked(path, 0) as mine:
                held |= set() if mine else {path.name}
        return held


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
    if not folder.is_dir():
        _make(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        os.fsync(handle)
    os.close(handle)


# A store that refuses connections is tried for some 15 s, one that gives no answer for 6 * 30 s. The user's
# configuration wins.
S3_CLIENT = {"connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 6}}
READ_TRIES = 6
WRITE_TRIES = 2
# For the whole of a write: no time-out of the client's own runs while it asks a store whether to send the data, or
# sends them.
WRITE_S, WRITE_BYTES_PER_S = 60.0, 250_000


@cache  # never let go: a child that drops what it inherited waits a second for an event loop that it does not have
def _opened(folder: "RemoteFolder", _process: int) -> tuple[Any, str]:
    """The file system of a folder, and its root's path there. Of this process: connections and event loops do not live
    through a fork.
    """
    try:
        return _file_system(folder.url)
    except (ImportError, ValueError) as error:
        raise HdovdError(
            f"{folder.url}: {error}. For s3:// pip install 'hdovd[s3]', for gs:// pip install 'hdovd[gs]'"
        ) from error


class RemoteFolder(Folder):
    """A prefix of an object store. s3:// needs s3fs (`pip install hdovd[s3]`), gs:// needs gcsfs (`hdovd[gs]`)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @property
    def _fs(self) -> Any:
        return _opened(self, os.getpid())[0]

    def _at(self, name: str) -> str:
        return f"{_opened(self, os.getpid())[1]}/{name}".rstrip("/")

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        with self._told(name):
            return bytes(_tried(READ_TRIES, self._fs.cat_file, self._at(name), start=start, end=stop))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """All at once; what fails is read again alone."""
        with self._told(""):
            found = self._fs.cat_ranges([self._at(n) for n in names], None, None, on_error="return") if names else []
        return [
            self.read(name) if isinstance(data, BaseException) else bytes(data)
            for name, data in zip(names, found, strict=True)
        ]

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        if exclusive:
            return not self.exists(name) and self._create(name, data)
        with self._told(name, missing_is_an_error=True):
            self._pipe(name, data)
        return True

    def _pipe(self, name: str, data: bytes, **how: str) -> None:
        limit = {"timeout": WRITE_S + len(data) / WRITE_BYTES_PER_S} if self._fs.async_impl else {}
        _tried(WRITE_TRIES, self._fs.pipe_file, self._at(name), data, **how, **limit)

    def _create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none: the store sees to it, or if it cannot, nobody."""
        try:
            self._pipe(name, data, mode="create")
        except FileExistsError:
            return False
        except (
            Exception
        ):  # taken in the same moment, or a store that knows no such condition, or one that is not to be reached
            return not self.exists(name) and self.write(name, data)
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        start, below = len(self._at("")) + 1, f"{prefix}/".lstrip("/")
        with self._told(prefix), contextlib.suppress(FileNotFoundError):
            found = self._fs.find(self._at(prefix), detail=True)
            return {
                name[start:]: int(info["size"])
                for name, info in sorted(found.items())
                if name[start:].startswith(below)
            }
        return {}

    def exists(self, name: str) -> bool:
        with self._told(name), contextlib.suppress(FileNotFoundError):
            return bool(
                self._fs.info(self._at(name))["type"] == "file"
            )  # `isfile` says no when the store cannot be reached
        return False

    def modified(self, name: str) -> float:
        with self._told(name):
            return float(self._fs.modified(self._at(name)).timestamp())

    def delete(self, name: str) -> None:
        for listed in self.sizes(name) or [name]:  # `rm` takes [, * and ? in names for patterns
            with self._told(listed), contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(listed))

    @contextmanager
    def _told(self, name: str, *, missing_is_an_error: bool = False) -> Iterator[None]:
        """Errors of the client, each has its own, as what a user can do something about."""
        try:
            yield
        except Exception as error:
            if isinstance(error, HdovdError) or (isinstance(error, FileNotFoundError) and not missing_is_an_error):
                raise
            raise HdovdError(
                f"{self.url}/{name}: {type(error).__name__}: {error}. Is the store there and to be reached, and are "
                f"its credentials set? What was finished before is kept: run the same command again"
            ) from error


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    import fsspec.config
    from fsspec.core import url_to_fs

    if not url.startswith(("s3://", "s3a://")):
        fs, root = url_to_fs(url, use_listings_cache=False)
        return fs, root.rstrip("/")
    theirs = fsspec.config.apply_config(fsspec.get_filesystem_class("s3"), {})
    own = {**S3_CLIENT, **theirs.get("config_kwargs", {})}
    if own["retries"] is S3_CLIENT["retries"] and {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        del own["retries"]  # which would go before the environment's
    requests = theirs.get("max_concurrency", 1)  # one a read: with more it asks for the size first
    fs, root = url_to_fs(url, use_listings_cache=False, max_concurrency=requests, config_kwargs=own)
    fs.retries = 1  # of all of the client's: s3fs would multiply the time and not the chances
    return fs, root.rstrip("/")


def _tried(tries: int, call: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """What `call` returns, tried again where an answer began and did not end: what came before it, the client has tried
    again itself.
    """
    trial = 1
    while True:
        try:
            return call(*words, **options)
        except Exception as error:
            broke_off = (
                type(error).__name__ in ("ResponseStreamingError", "IncompleteReadError")
                or type(error).__module__.startswith("aiohttp")
                or isinstance(error, TimeoutError)
            )
            if trial == tries or not broke_off:
                raise
        time.sleep(0.05 * 2**trial)
        trial += 1


class PulledFolder(LocalFolder):
    """What was pushed to the Hub as a cache, hf://USER/NAME[@REVISION]: pulled once, and read only."""

    def __init__(self, url: str) -> None:
        super().__init__(pulled(url, "cache"))
        self.url = url

    def write(self, name: str, data: bytes, *, exclusive: bool = False) -> bool:
        raise HdovdError(f"{self.url} is read only: write into a folder, and hdovd push it")

    def delete(self, name: str) -> None:
        self.write(name, b"")

    claim = Folder.claim


def open_folder(url: str | Path) -> Folder:
    """A local path, or file://, hf://, s3://, gs:// and whatever else fsspec knows. Raises HdovdError for a file:// URL
    of another machine.
    """
    text = str(url)
    if is_hub(text):
        return PulledFolder(text)
    if "://" not in text:
        return LocalFolder(Path(text))
    if text.startswith("file://"):
        host, slash, path = text.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise HdovdError(f"{text}: expected file:///PATH with three slashes, or the path alone")
        return LocalFolder(Path(unquote(slash + path)))
    return RemoteFolder(text)
