"""Random access to the rows of one sharded array: mapped where it can be, through Zarr with an LRU of chunks
elsewhere."""

import math
import mmap
import resource
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from hdovd.cache.product import Product, decoded
from hdovd.cache.store import REPAIR, naming_damage
from hdovd.core import HdovdError

LRU_BYTES = 128 * 2**20
# neighbours that are decoded together and then count as one chunk: a call of Zarr's costs half of what a chunk does
CHUNKS_AT_ONCE = 4
OTHER_FILES = 512  # that a process may have open beside the shards


class _NotPlainError(Exception):
    """A shard that Zarr can read and a map cannot."""


class Rows:
    """An array (rows, ...) read by ranges of rows. Safe after fork and spawn: a map is shared by processes, and a copy
    of this object opens its own.

    `mapped`: uncompressed shards whose chunks lie in order are plain rows, so each part is mapped once and sliced. Any
    other array, compressed or remote, is read through Zarr: decoded chunks are kept, the least recently used ones
    dropped, which is fast where reads are near each other.
    """

    def __init__(
        self,
        product: Product,
        name: str,
        *,
        mapped: bool | None = None,
        parts: Collection[int] | None = None,
        checked: bool = False,
    ) -> None:
        """The rows of a product's row array: of all parts, or of `parts` alone. `mapped`: None for what fits, True or
        False to insist. `checked`: compare the checksum of each part when it is first read.

        Raises HdovdError if a shard is not there or is cut short, or if `mapped` is asked for and cannot be.
        """
        array = product.array(name)
        if array.shape[0] != product.rows:
            raise HdovdError(
                f"{product.folder.url}: {name} of {product} has {array.shape[0]} rows, expected {product.rows}"
            )
        self._product, self._name, self._array = product, name, array
        self._known = mmap.mmap(-1, max(1, product.parts))  # forked processes share it
        self._known[:] = bytes([not checked]) * len(self._known)
        wanted = range(product.parts) if parts is None else sorted(parts)
        _check_objects(product, name, array, wanted)
        self.mapped, self._size = mapped is not False, product.part_rows
        try:
            self._shards = _map_shards(product, name, array, wanted) if self.mapped else {}
        except _NotPlainError as error:
            if mapped:
                raise HdovdError(f"{product.folder.url}: {name} of {product} cannot be mapped: {error}") from None
            self.mapped, self._shards = False, {}
        if not self.mapped:  # whole chunks of one part: the next part may be missing
            self._size = array.chunks[0] * math.gcd(CHUNKS_AT_ONCE, product.part_rows // array.chunks[0])
            per_chunk = max(1, self._size * int(np.prod(array.shape[1:], dtype=int)) * array.dtype.itemsize)
            self._most = max(4, LRU_BYTES // per_chunk)
            self._decoded = lru_cache(self._most)(self._decode)
        self._again = partial(Rows, product, name, mapped=self.mapped, parts=parts, checked=checked)

    def __reduce__(self) -> Any:
        return self._again, ()

    @property
    def reads_best_in_blocks(self) -> bool:
        """Whether reads far from each other decode the same rows again and again: there are more chunks than are
        kept.
        """
        return not self.mapped and -(-int(self._array.shape[0]) // self._size) > self._most

    def read(self, start: int, stop: int, *, copy: bool = True) -> np.ndarray:
        """Rows start to stop: a copy, or without `copy` what is mapped itself where it can be, to be read only."""
        if start == stop:
            return np.zeros((0, *self._array.shape[1:]), self._array.dtype)
        pieces = []
        for number in range(start // self._size, (stop - 1) // self._size + 1):
            first, last = max(0, start - number * self._size), min(stop - number * self._size, self._size)
            pieces.append(self._mapped(number, first, last) if self.mapped else self._decoded(number)[first:last])
        if len(pieces) > 1:
            return np.concatenate(pieces)
        return pieces[0] if self.mapped and not copy else pieces[0].copy()

    def release(self) -> None:
        """Let go of the memory that read rows take, where the system can give them again without a copy."""
        for file, _ in self._shards.values():
            file.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, part: int, first: int, last: int) -> np.ndarray:
        """Rows of a part, asked for in one go: a map alone waits for the disk page by page."""
        self._require_sound(part)
        file, rows = self._shards[part]
        begin = first * rows.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(mmap.MADV_WILLNEED, begin, last * rows.strides[0] - begin)
        return rows[first:last]

    def _decode(self, chunk: int) -> np.ndarray:
        self._require_sound(chunk * self._size // self._product.part_rows)
        return decoded(self._array, slice(chunk * self._size, (chunk + 1) * self._size))

    def _require_sound(self, part: int) -> None:
        """Raises HdovdError if a part is not what was written. It is read whole for that, once, by one process for all
        that it forked.
        """
        if not self._known[part]:
            self._product.require_sound(part, [self._product.row_objects(part)[self._name]])
            self._known[part] = 1


def _check_objects(product: Product, name: str, array: zarr.Array[Any], parts: Sequence[int]) -> None:
    """Raise HdovdError if an object of these parts is not there, now and not in the midst of a training run."""
    listed = product.folder.sizes(f"{product.prefix}/{name}")
    rows, rest = (array.shards or array.chunks)[0], (0,) * (array.ndim - 1)
    for part in parts:
        start, stop = product.rows_of(part)
        for number in range(start // rows, -(-stop // rows)):
            wanted = f"{product.prefix}/{name}/{array.metadata.encode_chunk_key((number, *rest))}"
            if wanted not in listed:
                raise HdovdError(f"{product.folder.url}/{wanted} (part {part} of {product}) is missing: {REPAIR}")


def _map_shards(
    product: Product, name: str, array: zarr.Array[Any], parts: Sequence[int]
) -> dict[int, tuple[mmap.mmap, np.ndarray]]:
    """The maps of these parts, and the rows in them. Raises _NotPlainError for shards that are no plain rows in a local
    file, each of them a part.
    """
    if product.folder.path("zarr.json") is None:
        raise _NotPlainError("it is not on a local file system")
    codecs = tuple(getattr(array.metadata, "codecs", ()))
    if array.shards is None or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec) or not _is_plain(codecs[0]):
        raise _NotPlainError("it is not sharded, or its chunks are compressed or not little-endian")
    if array.shape[0] > product.part_rows and array.shards[0] != product.part_rows:
        raise _NotPlainError("its shards are not the product's parts")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < len(parts) + OTHER_FILES:  # a map keeps its file open, and the usual limit is 1024
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return {part: _map_shard(product, name, array, part) for part in parts}


def _is_plain(sharding: ShardingCodec) -> bool:
    """Rows as they lie in memory, with the index at the end and its checksum after it."""
    inner, index = tuple(sharding.codecs), tuple(sharding.index_codecs)
    return (
        len(inner) == 1
        and isinstance(inner[0], BytesCodec)
        and getattr(inner[0].endian, "value", inner[0].endian) in ("little", None)
        and len(index) == 2
        and isinstance(index[0], BytesCodec)
        and isinstance(index[1], Crc32cCodec)
        and getattr(sharding.index_location, "value", sharding.index_location) == "end"  # zarr 3.4: a plain text
    )


def _map_shard(product: Product, name: str, array: zarr.Array[Any], part: int) -> tuple[mmap.mmap, np.ndarray]:
    """One shard's map, and its rows in it; the index must say that the chunks follow one another from byte 0."""
    path = product.folder.path(f"{product.prefix}/{product.row_objects(part)[name]}")
    assert path is not None and array.shards is not None  # noqa: PT018
    start, stop = product.rows_of(part)
    chunk_rows, row_shape = array.chunks[0], array.shape[1:]
    chunk_bytes = chunk_rows * int(np.prod(row_shape, dtype=int)) * array.dtype.itemsize
    used, entries = -(-(stop - start) // chunk_rows), array.shards[0] // chunk_rows
    with naming_damage(f"{path} (rows {start} to {stop} of {product})"), path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        data, index_bytes = np.frombuffer(file, np.uint8), 16 * entries + 4
        tail = bytes(data[-index_bytes:])
        if google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise ValueError(f"it is cut short at {len(data)} bytes, or the checksum of its shard index is wrong")
        index = np.frombuffer(tail[:-4], "<u8").reshape(entries, 2)
    expected = np.stack([np.arange(used) * chunk_bytes, np.full(used, chunk_bytes)], axis=1)
    if len(data) < used * chunk_bytes + index_bytes or not np.array_equal(index[:used], expected):
        raise _NotPlainError(f"the chunks of {path} do not follow one another")
    return file, data[: (stop - start) * chunk_bytes // chunk_rows].view(array.dtype).reshape(stop - start, *row_shape)
