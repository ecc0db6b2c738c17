"""Random access to the rows of one sharded array: mapped where it can be, through Zarr with an LRU of chunks
elsewhere."""

import math
import mmap
import resource
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from hdovd.cache.product import Product, decoded
from hdovd.cache.store import REPAIR, naming_damage
from hdovd.core.errors import HdovdError

LRU_BYTES = 128 * 2**20
# neighbours that are decoded together and then count as one chunk: a call of Zarr's costs half of what a chunk does
CHUNKS_AT_ONCE = 4
# A mapped read that takes so long waited for the disk: the data are not in memory. Asking ahead costs a fifth of a read
# that need not wait, so it is done after such a read, until so many in a row were quick.
SLOW_READ_S = 1e-4
READS_AHEAD = 64
OTHER_FILES = 512  # that a process may have open beside the shards


class _NotPlainError(Exception):
    """A shard that Zarr can read and a map cannot."""


class Rows(ABC):
    """An array (rows, ...) read by ranges of rows. A copy in another process opens its own.

    `reads_best_in_blocks`: whether reads far from each other decode the same rows again and again.
    """

    mapped = True

    def __init__(
        self,
        product: Product,
        name: str,
        array: zarr.Array[Any],
        parts: Collection[int] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self._opened_from: dict[str, Any] = {"product": product, "name": name, "parts": parts, "checked": checked}
        self._product, self._name, self._part_rows = product, name, product.part_rows
        self._known = mmap.mmap(-1, max(1, product.parts))  # forked processes share it
        self._known[:] = bytes([not checked]) * len(self._known)
        self._open(array, range(product.parts) if parts is None else sorted(parts))

    @abstractmethod
    def _open(self, array: zarr.Array[Any], parts: Sequence[int]) -> None:
        """Make ready to read these parts of the array."""

    def __reduce__(self) -> Any:
        return partial(open_rows, mapped=self.mapped, **self._opened_from), ()

    @property
    def reads_best_in_blocks(self) -> bool:
        return False

    @abstractmethod
    def read(self, start: int, stop: int, *, copy: bool = True) -> np.ndarray:
        """Rows start to stop: a copy, or without `copy` what is mapped itself where it can be, to be read only."""

    def release(self) -> None:  # noqa: B027
        """Let go of the memory that read rows take, where the system can give them again without a copy."""

    def _require_sound(self, part: int) -> None:
        """Raises HdovdError if a part is not what was written. It is read whole for that, once, by one process for all
        that it forked.
        """
        if not self._known[part]:
            self._product.require_sound(part, [self._product.row_objects(part)[self._name]])
            self._known[part] = 1


def open_rows(
    product: Product,
    name: str,
    *,
    mapped: bool | None = None,
    parts: Collection[int] | None = None,
    checked: bool = False,
) -> Rows:
    """The rows of a product's row array: of all parts, or of `parts` alone. `mapped`: None for what fits, True or False
    to insist. `checked`: compare the checksum of each part when it is first read.

    Raises HdovdError if a shard is not there or is cut short, or if `mapped` is asked for and cannot be.
    """
    array = product.array(name)
    if array.shape[0] != product.rows:
        raise HdovdError(
            f"{product.folder.url}: {name} of {product} has {array.shape[0]} rows, expected {product.rows}"
        )
    if mapped is not False:
        try:
            return MappedRows(product, name, array, parts, checked=checked)
        except _NotPlainError as error:
            if mapped:
                raise HdovdError(f"{product.folder.url}: {name} of {product} cannot be mapped: {error}") from None
    return ZarrRows(product, name, array, parts, checked=checked)


class MappedRows(Rows):
    """Uncompressed shards whose chunks lie in order are plain rows: each is mapped once and sliced. _NotPlainError for
    others.

    Safe after fork and spawn: a map is shared by processes, and a copy of this object opens its own.
    """

    def _open(self, array: zarr.Array[Any], parts: Sequence[int]) -> None:
        _require_plain(self._product, array)
        _allow_open_files(len(parts))
        self._shards = {part: _map_shard(self._product, self._name, array, part) for part in parts}
        self._no_rows = np.zeros((0, *array.shape[1:]), array.dtype)
        self._ahead = READS_AHEAD  # reads that are still to be asked for ahead

    def read(self, start: int, stop: int, *, copy: bool = True) -> np.ndarray:
        part, first = divmod(start, self._part_rows)
        last = first + stop - start
        if not first < last <= self._part_rows:
            return self._read_across(start, stop)
        self._require_sound(part)
        if self._ahead:
            self._ask_for(part, first, last)
        since = perf_counter()
        rows = self._shards[part][1][first:last]
        rows = rows.copy() if copy else rows
        if perf_counter() - since > SLOW_READ_S:
            self._ahead = READS_AHEAD
        elif self._ahead:
            self._ahead -= 1
        return rows

    def release(self) -> None:
        for file, _ in self._shards.values():
            file.madvise(mmap.MADV_DONTNEED)

    def _read_across(self, start: int, stop: int) -> np.ndarray:
        """Rows of several parts, or none."""
        pieces = [self._no_rows]
        while start < stop:
            after = min(stop, start - start % self._part_rows + self._part_rows)
            pieces.append(self.read(start, after))
            start = after
        return np.concatenate(pieces)

    def _ask_for(self, part: int, first: int, last: int) -> None:
        """Have the system read these rows in one go: a map alone waits for the disk page by page."""
        file, rows = self._shards[part]
        begin = first * rows.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(mmap.MADV_WILLNEED, begin, last * rows.strides[0] - begin)


class ZarrRows(Rows):
    """Any Zarr array, compressed or remote: decoded chunks are kept, the least recently used ones dropped.

    Fast where reads are near each other: use it with an order that shuffles blocks of images.
    """

    mapped = False

    def _open(self, array: zarr.Array[Any], parts: Sequence[int]) -> None:
        self._array = array
        # Whole chunks of one part: the next part may be missing.
        self._chunk = array.chunks[0] * math.gcd(CHUNKS_AT_ONCE, self._part_rows // array.chunks[0])
        per_chunk = max(1, self._chunk * int(np.prod(array.shape[1:], dtype=int)) * array.dtype.itemsize)
        self._most = max(4, LRU_BYTES // per_chunk)
        self._decoded = lru_cache(self._most)(self._decode)
        _check_objects(self._product, self._name, array, parts)

    @property
    def reads_best_in_blocks(self) -> bool:
        """True if there are more chunks than are kept."""
        return -(-int(self._array.shape[0]) // self._chunk) > self._most

    def read(self, start: int, stop: int, *, copy: bool = True) -> np.ndarray:
        first, last = start // self._chunk, max(start, stop - 1) // self._chunk
        if first == last:
            return self._decoded(first)[start - first * self._chunk : stop - first * self._chunk].copy()
        return np.concatenate(
            [self._decoded(c)[max(0, start - c * self._chunk) : stop - c * self._chunk] for c in range(first, last + 1)]
        )

    def _decode(self, chunk: int) -> np.ndarray:
        start = chunk * self._chunk
        if start < self._array.shape[0]:
            self._require_sound(start // self._part_rows)
        return decoded(self._array, slice(start, start + self._chunk))


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


def _allow_open_files(count: int) -> None:
    """Let this process open `count` files beside what it has: a map keeps its file open, and the usual limit is
    1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _require_plain(product: Product, array: zarr.Array[Any]) -> None:
    """Raises _NotPlainError for shards that, by their metadata, are no plain rows in a local file."""
    if product.folder.path("zarr.json") is None:
        raise _NotPlainError("it is not on a local file system")
    codecs = tuple(getattr(array.metadata, "codecs", ()))
    if array.shards is None or len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        raise _NotPlainError("it is not sharded")
    if not _is_plain(codecs[0]):
        raise _NotPlainError("its chunks are compressed, or not little-endian")
    if array.shape[0] > product.part_rows and array.shards[0] != product.part_rows:
        raise _NotPlainError("its shards are not the product's parts")


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
    chunk_rows, shard_rows = array.chunks[0], array.shards[0]
    row_shape = array.shape[1:]
    chunk_bytes = chunk_rows * int(np.prod(row_shape, dtype=int)) * array.dtype.itemsize
    used, entries = -(-(stop - start) // chunk_rows), shard_rows // chunk_rows
    with naming_damage(f"{path} (rows {start} to {stop} of {product})"):
        try:
            with path.open("rb") as opened:
                file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ValueError("it is missing") from None
        data, index_bytes = np.frombuffer(file, np.uint8), 16 * entries + 4
        if len(data) < index_bytes:
            raise ValueError(f"it is cut short: {len(data)} bytes")
        tail = bytes(data[-index_bytes:])
        if google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise ValueError("the checksum of its shard index is wrong")
    index = np.frombuffer(tail[:-4], "<u8").reshape(entries, 2)
    expected = np.stack([np.arange(used) * chunk_bytes, np.full(used, chunk_bytes)], axis=1)
    if len(data) < used * chunk_bytes + index_bytes or not np.array_equal(index[:used], expected):
        raise _NotPlainError(f"the chunks of {path} do not follow one another")
    return file, data[: (stop - start) * chunk_bytes // chunk_rows].view(array.dtype).reshape(stop - start, *row_shape)
