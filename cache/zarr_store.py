"""The folder of an array of a cache as a Zarr store, to be read only: Zarr then has the folder's own retries, errors
and care for forks.

What is not there or empty is an error: every part and every table is written whole, and Zarr would make up its values.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, cast

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from hdovd.cache.store import REPAIR, Folder
from hdovd.core import HdovdError


def _no_use(store: Store, *_: Any) -> Any:
    raise NotImplementedError(f"{store} is read by name alone")


class FolderStore(Store):
    """What Zarr asks of a store, answered by `Folder`."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, folder: Folder, prefix: str) -> None:
        super().__init__(read_only=True)
        self._folder, self._prefix = folder, prefix

    def __str__(self) -> str:
        return f"{self._folder.url}/{self._prefix}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FolderStore) and str(other) == str(self)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._folder.read, f"{self._prefix}/{key}", *_slice(byte_range))
        except FileNotFoundError:
            data = b""
        if not data:
            raise HdovdError(f"{self}/{key} is missing or empty: {REPAIR}")
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [*await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._folder.exists, f"{self._prefix}/{key}")

    set = delete = list = list_prefix = list_dir = cast(Any, _no_use)  # reads by name alone


def _slice(byte_range: ByteRequest | None) -> tuple[Any, Any]:
    """First byte and byte after the last, as `Folder.read` takes them."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end
    if isinstance(byte_range, OffsetByteRequest):
        return byte_range.offset, None
    return (-byte_range.suffix, None) if isinstance(byte_range, SuffixByteRequest) else (None, None)
