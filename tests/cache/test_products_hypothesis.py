"""Products of every shape: what was written comes back by every way of reading, however the writing was broken off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, example, given, settings, strategies as st
from store_contract import begin, contents, failing, ragged, write_parts
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec

from hdovd.cache import CHUNK_ROWS, TABLE_ARRAYS, Level, Product
from hdovd.cache.rows import Rows
from hdovd.cache.store import LocalFolder
from hdovd.core import HdovdError

few = settings(max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
counts = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from([0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, 3000])),
    max_size=6,
)
part_rows = st.one_of(st.integers(1, 70), st.sampled_from([CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS, 3 * CHUNK_ROWS]))
dims = st.integers(1, 5)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda: LocalFolder(tmp_path_factory.mktemp("products"))


def _ranges(rows: int, seed: int) -> list[tuple[int, int]]:
    """Ranges of rows, the ends among them."""
    rng = random.Random(seed)
    some = [sorted(rng.choices(range(rows + 1), k=2)) for _ in range(12)]
    return [(0, rows), (0, 0), (rows, rows), *((start, stop) for start, stop in some)]


@few
@given(counts, dims, part_rows, st.integers(0, 9))
def test_what_is_written_is_read(new_folder: Any, counts: list[int], dim: int, part_rows: int, seed: int) -> None:
    rows_a_part = part_rows * max(1, -(-sum(counts) // (40 * part_rows)))  # 40 parts are enough
    if rows_a_part > CHUNK_ROWS:
        rows_a_part = -(-rows_a_part // CHUNK_ROWS) * CHUNK_ROWS
    folder, arrays = new_folder(), ragged(counts, dim, seed)
    product = write_parts(begin(folder, arrays, rows_a_part), arrays)
    assert product.whole
    assert product.parts == -(-sum(counts) // rows_a_part)
    for name in TABLE_ARRAYS[Level.INSTANCE]:
        np.testing.assert_array_equal(product.table(name), arrays[name])
    plain: Any = zarr.open_group(folder.url, mode="r", path=product.prefix)
    np.testing.assert_array_equal(plain["embedding"][:], arrays["embedding"])
    for rows in (Rows(product, "embedding", mapped=True), Rows(product, "embedding", mapped=False)):
        for start, stop in _ranges(sum(counts), seed):
            found = rows.read(start, stop)
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, arrays["embedding"][start:stop])


@few
@given(
    st.lists(st.integers(0, 9), max_size=5),
    dims,
    st.integers(2, 20),
    st.lists(st.integers(1, 40), max_size=4),
    st.randoms(use_true_random=False),
)
def test_a_broken_off_writing_ends_with_the_same_bytes(
    new_folder: Any, counts: list[int], dim: int, part_rows: int, breaks: list[int], rng: random.Random
) -> None:
    """Parts in any order, and again what was done before."""
    arrays, unbroken, folder = ragged(counts, dim), new_folder(), new_folder()
    write_parts(begin(unbroken, arrays, part_rows), arrays)
    write = folder.write
    for writes in [*breaks, None]:
        folder.write = write if writes is None else failing(write, writes)
        try:
            writer = begin(folder, arrays, part_rows)
            parts = list(range(writer.product.parts))
            rng.shuffle(parts)
            write_parts(
                writer, arrays, [part for part in parts if not writer.product.is_finished(part) or rng.random() < 0.2]
            )
        except HdovdError:
            assert writes is not None
        recorded = {name for name in folder.sizes("") if "/parts/" in name}
        for name in recorded:
            assert folder.read(name) == unbroken.read(name)  # with the checksums of
        if recorded:  # what is there
            product = Product(folder, Level.INSTANCE, next(iter(recorded)).split("/")[1])
            for record in product.records().values():
                for name in record["objects"]:
                    assert folder.read(f"{product.prefix}/{name}") == unbroken.read(f"{product.prefix}/{name}")
    assert contents(folder) == contents(unbroken)


# What differs from a product's own layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    "zstd": {"compressors": ZstdCodec()},
    "blosc": {"compressors": BloscCodec()},
    "big endian": {"serializer": BytesCodec(endian="big")},
    "index first": {"shards": {"shape": (64, 2), "index_location": "start"}},
    "no shards": {"shards": None},
    "other shards": {"shards": (48, 2)},
    "a chunk left out": {"fill_value": 0},
}


@few
@given(st.integers(17, 300), st.sampled_from(sorted(LAYOUTS)))
def test_what_plain_zarr_has_written_is_read_through_zarr(new_folder: Any, rows: int, how: str) -> None:
    folder, arrays = new_folder(), ragged([rows], 2)
    if how == "a chunk left out":
        arrays["embedding"][:16] = 0
    product = begin(folder, arrays, 64).product
    layout = {"chunks": (16, 2), "shards": (64, 2), "compressors": None, "fill_value": 1} | LAYOUTS[how]
    zarr.create_array(
        zarr.storage.LocalStore(Path(folder.url) / product.prefix),
        name="embedding",
        data=arrays["embedding"],
        overwrite=True,
        **layout,
    )
    product = Product(folder, Level.INSTANCE, product.key)
    found = Rows(product, "embedding")
    for start, stop in _ranges(rows, 0):
        np.testing.assert_array_equal(found.read(start, stop), arrays["embedding"][start:stop])
    if how == "other shards" and rows <= 48:  # one shard is one part
        return
    assert not found.mapped
    with pytest.raises(HdovdError, match="cannot be mapped"):
        Rows(product, "embedding", mapped=True)


@few
@given(st.permutations(range(4)), st.integers(0, 20), dims)
def test_chunks_out_of_order_are_read_through_zarr(new_folder: Any, order: list[int], gap: int, dim: int) -> None:
    """Zarr allows a shard to hold its chunks in any order, with anything between them."""
    folder, arrays = new_folder(), ragged([4 * CHUNK_ROWS], dim)
    product = write_parts(begin(folder, arrays, 4 * CHUNK_ROWS), arrays)
    name = f"{product.prefix}/embedding/c/0/0"
    shard, size = folder.read(name), CHUNK_ROWS * dim * 2
    index = np.zeros((4, 2), "<u8")
    for place, chunk in enumerate(order):
        index[chunk] = place * (size + gap), size
    data = b"".join(shard[chunk * size : (chunk + 1) * size] + bytes(gap) for chunk in order)
    folder.write(name, data + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))
    plain: Any = zarr.open_group(folder.url, mode="r", path=product.prefix)
    np.testing.assert_array_equal(plain["embedding"][:], arrays["embedding"])
    found = Rows(product, "embedding")
    assert found.mapped == (order == [0, 1, 2, 3] and not gap)
    for start, stop in _ranges(4 * CHUNK_ROWS, gap):
        np.testing.assert_array_equal(found.read(start, stop), arrays["embedding"][start:stop])


@few
@given(st.integers(1, 16 * 4 + 4), st.integers(0, 7), st.none() | st.floats(0, 0.999))
@example(1, 0, 0.0)  # Zarr takes an empty shard for one that was never written
def test_damage_to_a_shards_index_is_an_error(new_folder: Any, byte: int, bit: int, cut: float | None) -> None:
    folder, arrays = new_folder(), ragged([5 * CHUNK_ROWS])
    product = write_parts(begin(folder, arrays, 4 * CHUNK_ROWS), arrays)
    name = f"{product.prefix}/embedding/c/0/0"
    shard = bytearray(folder.read(name))
    if cut is not None:
        del shard[int(cut * len(shard)) :]
    else:
        shard[-byte] ^= 1 << bit
    folder.write(name, bytes(shard))
    for mapped in (None, False):
        with pytest.raises(HdovdError, match=r"embedding.*verify --repair"):
            Rows(product, "embedding", mapped=mapped).read(0, 10)
    np.testing.assert_array_equal(
        Rows(product, "embedding", parts={1}).read(4 * CHUNK_ROWS, 4 * CHUNK_ROWS + 9),
        arrays["embedding"][4 * CHUNK_ROWS : 4 * CHUNK_ROWS + 9],
    )
