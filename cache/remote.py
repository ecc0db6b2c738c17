"""A cache in an object store, through fsspec: s3://, gs:// and whatever else fsspec knows.

Endpoint and credentials come from where the client looks for them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...) or from
fsspec's own configuration (FSSPEC_S3, ~/.config/fsspec). A PUT is whole or absent, so are writes; without locks, claims
are not kept, and two workers may do the same part.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hdovd.cache.store import Folder
from hdovd.core.errors import HdovdError

# A store that refuses connections is tried for some 15 s, one that gives no answer for 6 * 30 s. The user's
# configuration wins.
S3_CLIENT = {"connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 6}}
S3FS_TRIES = 1  # of all of that: s3fs would multiply the time and not the chances
READ_TRIES = 6
WRITE_TRIES = 2
# For the whole of a write: no time-out of the client's own runs while it asks a store whether to send the data, or
# sends them.
WRITE_S, WRITE_BYTES_PER_S = 60.0, 250_000

# File systems are never let go: a child that drops what it inherited waits a second for its parent's event loop, which
# it has not.
_kept: list[Any] = []


class RemoteFolder(Folder):
    """A prefix of an object store. s3:// needs s3fs (`pip install hdovd[s3]`), gs:// needs gcsfs (`hdovd[gs]`)."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> Any:
        return RemoteFolder, (self.url,)

    @property
    def _fs(self) -> Any:
        return self._open()[0]

    def _at(self, name: str) -> str:
        return f"{self._open()[1]}/{name}".rstrip("/")

    def _open(self) -> tuple[Any, str]:
        """The file system and the root's path in it. Of this process: connections and event loops do not live through a
        fork.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                fs, root = _file_system(self.url)
            except (ImportError, ValueError) as error:
                raise HdovdError(
                    f"{self.url}: {error}. For s3:// pip install 'hdovd[s3]', for gs:// pip install 'hdovd[gs]'"
                ) from error
            _kept.append(fs)
            self._opened = os.getpid(), fs, root.rstrip("/")
        return self._opened[1:]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        with self._told(name):
            for trial in range(READ_TRIES):
                try:
                    return bytes(self._fs.cat_file(self._at(name), start=start, end=stop))
                except Exception as error:
                    if not _broke_off(error) or trial == READ_TRIES - 1:
                        raise
                time.sleep(0.1 * 2**trial)
        raise AssertionError

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
        for trial in range(WRITE_TRIES):
            try:
                self._fs.pipe_file(self._at(name), data, **how, **limit)
                return
            except TimeoutError:
                if trial == WRITE_TRIES - 1:
                    raise

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
    import fsspec.config
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        theirs = fsspec.config.apply_config(fsspec.get_filesystem_class("s3"), {})
        options["max_concurrency"] = theirs.get(
            "max_concurrency", 1
        )  # one request a read: with more it asks for the size first
        options["config_kwargs"] = {**S3_CLIENT, **theirs.get("config_kwargs", {})}
        if {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys() and "retries" not in theirs.get(
            "config_kwargs", {}
        ):
            del options["config_kwargs"]["retries"]
    fs, root = url_to_fs(url, **options)
    if url.startswith(("s3://", "s3a://")):
        fs.retries = S3FS_TRIES
    return fs, root


def _broke_off(error: Exception) -> bool:
    """Whether an answer began and did not end: what came before it, the client has tried again itself."""
    return (
        isinstance(error, TimeoutError)
        or type(error).__module__.startswith("aiohttp")
        or type(error).__name__ in ("ResponseStreamingError", "IncompleteReadError")
    )
