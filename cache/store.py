"""Where a cache's bytes lie: a local folder, or an object store by URL. One contract for both, `Folder`; and one error
for damage.

Names are relative, with slashes. A write is whole or absent under its name, and durable when it returns.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hdovd.core.errors import HdovdError

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
        if path is None:
            return hashlib.sha256(self.read(name)).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

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

    def sweep(self) -> list[str]:
        """Delete what processes that are dead left half-written; returns the names."""
        return []
