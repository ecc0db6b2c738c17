"""What a store of a cache has to do, for `Folder` and for products on top of it. Each backend's tests subclass
`StoreContract`.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import zarr

from hdovd.cache import TABLE_ARRAYS, TABLES, Catalog, FeatureSet, Level, Product
from hdovd.cache.reader import FeatureCache
from hdovd.cache.rows import Rows
from hdovd.cache.store import Folder, open_folder
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError

COUNTS, PART_ROWS = (3, 0, 1, 9, 0, 4, 2), 4  # 19 rows: 5 parts, the last one not full
WHOLE = {TABLES, *range(5)}


def ragged(counts: Iterable[int], dim: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of an instance product: so many boxes an image."""
    rng, counts = np.random.default_rng(seed), list(counts)
    rows = rng.normal(size=(sum(counts), dim))
    ids = np.arange(len(counts), dtype=np.int64) * 7 + 3
    return {
        "embedding": (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16),
        "image_id": ids,
        "image_hash": ids.astype(np.uint64) * np.uint64(977),
        "box": rng.uniform(0, 99, (len(rows), 4)).astype(np.float32),
        "offset": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    }


def begin(folder: Folder, arrays: dict[str, np.ndarray], part_rows: int = PART_ROWS, **made_with: Any) -> ProductWriter:
    """Begin the instance product that holds `arrays`."""
    return ProductWriter.begin(
        folder,
        Level.INSTANCE,
        {"clip": "c"},
        rows=len(arrays["embedding"]),
        part_rows=part_rows,
        dim=arrays["embedding"].shape[1],
        tables={name: arrays[name] for name in TABLE_ARRAYS[Level.INSTANCE]},
        made_with=made_with,
    )


def write_parts(writer: ProductWriter, arrays: dict[str, np.ndarray], parts: Iterable[int] | None = None) -> Product:
    for part in range(writer.product.parts) if parts is None else parts:
        start, stop = writer.product.rows_of(part)
        writer.write_part(part, {"embedding": arrays["embedding"][start:stop]})
    return writer.product


def failing(write: Callable[..., bool], after: int) -> Callable[..., bool]:
    """A folder's `write`, without room after so many writes."""
    room = iter(range(after))

    def write_or_fail(name: str, data: bytes, *, exclusive: bool = False) -> bool:
        if next(room, None) is None:
            raise HdovdError("no room")
        return write(name, data, exclusive=exclusive)

    return write_or_fail


def contents(folder: Folder) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    names = list(folder.sizes(""))
    return dict(zip(names, folder.read_many(names), strict=True))


class StoreContract:
    """A subclass gives `url`: of nothing yet, with characters in it that mean something elsewhere."""

    exclusive_between_threads = True

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def folder(self, url: str) -> Folder:
        return open_folder(url)

    # --- objects ---

    def test_what_is_written_is_read(self, folder: Folder) -> None:
        for name, data in (("a", b"first"), ("b c/d%20[1]/é", b"\0\xff"), ("empty", b""), ("a", b"second")):
            assert folder.write(name, data)
            assert folder.read(name) == data
        assert contents(folder) == {"a": b"second", "b c/d%20[1]/é": b"\0\xff", "empty": b""}

    def test_ranges(self, folder: Folder) -> None:
        folder.write("a", b"0123456789")
        for start, stop in ((0, 3), (4, 7), (9, 10), (2, None), (-4, None), (None, 5)):
            assert folder.read("a", start, stop) == b"0123456789"[start:stop]

    def test_what_is_not_there(self, folder: Folder) -> None:
        folder.write("folder/a", b"1")
        for name in ("b", "folder/b", "none/a"):
            with pytest.raises(FileNotFoundError):
                folder.read(name)
            with pytest.raises(FileNotFoundError):
                folder.read_many(["folder/a", name])
            with pytest.raises(FileNotFoundError):
                folder.modified(name)
            assert not folder.exists(name)
        assert folder.sizes("none") == {}

    def test_read_many_keeps_the_order(self, folder: Folder) -> None:
        for number in range(12):
            folder.write(f"x [{number}]", b"%d" % number)
        assert folder.read_many([f"x [{number}]" for number in (11, 0, 5, 0)]) == [b"11", b"0", b"5", b"0"]
        assert folder.read_many([]) == []

    def test_folders_are_no_prefixes(self, folder: Folder) -> None:
        """instance/ab is not instance/abc, and neither is an object."""
        for name in ("instance/abc/x", "instance/ab/x", "instance/ab/y/z", "instance/ab.json"):
            folder.write(name, name.encode())
        assert folder.sizes("instance/ab") == {"instance/ab/x": 13, "instance/ab/y/z": 15}
        assert list(folder.sizes("")) == sorted(contents(folder))
        assert list(contents(folder)) == ["instance/ab.json", "instance/ab/x", "instance/ab/y/z", "instance/abc/x"]
        assert folder.sizes("instance/a") == folder.sizes("instance/ab/x") == {}
        assert [name for name in ("instance/ab", "instance", "instance/a", "instance/ab/x") if folder.exists(name)] == [
            "instance/ab/x"
        ]
        folder.delete("instance/a")
        folder.delete("instance/ab")
        folder.delete("instance/ab")
        assert list(folder.sizes("")) == ["instance/ab.json", "instance/abc/x"]
        folder.delete("instance/ab.json")
        assert list(folder.sizes("")) == ["instance/abc/x"]

    def test_modified_is_now(self, folder: Folder) -> None:
        folder.write("a", b"1")
        assert abs(folder.modified("a") - time.time()) < 600  # a wrong time zone is half an hour at least

    def test_exclusive_write_leaves_what_is_there(self, folder: Folder) -> None:
        assert folder.write("x/a", b"first", exclusive=True)
        assert not folder.write("x/a", b"second", exclusive=True)
        assert contents(folder) == {"x/a": b"first"}

    def test_one_of_many_exclusive_writers_wins(self, folder: Folder) -> None:
        if not self.exclusive_between_threads:
            pytest.skip("this store cannot")
        won: dict[int, bool] = {}
        self._at_once([lambda n=n: won.update({n: folder.write("x/a", b"%d" % n, exclusive=True)}) for n in range(8)])
        assert sum(won.values()) == 1
        assert folder.read("x/a") == b"%d" % next(n for n, did in won.items() if did)

    def test_an_object_is_seen_whole(self, folder: Folder) -> None:
        versions = [bytes([n]) * (200_000 + n) for n in range(12)]
        folder.write("a/b", versions[0])
        seen, done = [], threading.Event()

        def write() -> None:
            for version in versions:
                folder.write("a/b", version)
            done.set()

        def read() -> None:
            while not done.is_set() or not seen:
                seen.append((folder.read("a/b"), folder.sizes("a")))

        self._at_once([write, read])
        assert seen
        for data, sizes in seen:
            assert data in versions
            assert set(sizes) == {"a/b"}
            assert sizes["a/b"] in map(len, versions)

    def test_claims(self, folder: Folder) -> None:
        for _ in range(2):
            with folder.claim("instance/k/0", wait=False) as mine, folder.claim("instance/k/1", wait=True) as other:
                assert mine
                assert other
        assert folder.sizes("") == {}
        assert folder.sweep() == []

    # --- products ---

    def test_two_writers_fill_a_product_in_any_order(self, folder: Folder) -> None:
        arrays = ragged(COUNTS)
        one, other = begin(folder, arrays), begin(folder, arrays, 1024, batch_size=3)
        product = other.product
        assert product.part_rows == PART_ROWS  # the first one decides
        done: set[int] = set()
        for writer, part in ((one, 4), (other, 1), (one, 2), (other, 2), (one, 0)):
            write_parts(writer, arrays, [part])
            done.add(part)
            assert product.finished() == done
            assert product.missing() == sorted(set(range(5)) - done)
            assert not product.whole
        start, stop = product.rows_of(3)
        other.write_part(3, {"embedding": np.zeros((stop - start, 4))}, {24: "broken"})
        assert product.whole
        records = Product(folder, Level.INSTANCE, product.key).records()
        assert records.keys() == WHOLE
        listed = folder.sizes(product.prefix)
        for record in records.values():
            for name, found in record["objects"].items():
                data = folder.read(f"{product.prefix}/{name}")
                assert found == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                assert listed[f"{product.prefix}/{name}"] == len(data)
        assert product.failed() == {24: "broken"}
        assert product.failed_parts() == [3]
        assert product.bytes() == sum(listed.values())

    def test_rows_come_back(self, folder: Folder) -> None:
        arrays = ragged(COUNTS)
        product = write_parts(begin(folder, arrays), arrays)
        for mapped in (None, False):
            rows = Rows(product, "embedding", mapped=mapped)
            assert rows.mapped == (mapped is None and folder.path("a") is not None)
            for copy in (rows, pickle.loads(pickle.dumps(rows))):
                for start, stop in ((0, 19), (0, 0), (19, 19), (4, 8), (3, 9), (18, 19), (7, 7), (8, 12)):
                    np.testing.assert_array_equal(copy.read(start, stop), arrays["embedding"][start:stop])
        for name in TABLE_ARRAYS[Level.INSTANCE]:
            np.testing.assert_array_equal(product.table(name), arrays[name])
            assert product.table(name).dtype == arrays[name].dtype
        if folder.path("a") is None:
            with pytest.raises(HdovdError, match="cannot be mapped: it is not on a local file system"):
                Rows(product, "embedding", mapped=True)

    @pytest.mark.parametrize("writes", [1, 10, 13])
    def test_a_broken_write_leaves_no_half_finished_part_and_goes_on(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch, writes: int
    ) -> None:
        arrays = ragged(COUNTS)
        write_parts(begin(folder, arrays), arrays)
        unbroken = contents(folder)
        folder.delete("instance")
        with monkeypatch.context() as patch:
            patch.setattr(folder, "write", failing(folder.write, writes))
            with pytest.raises(HdovdError, match="no room"):
                write_parts(begin(folder, arrays), arrays)
        there = folder.sizes("")
        assert len(there) <= writes
        product = begin(folder, arrays).product
        assert not product.whole
        recorded = {f"{product.prefix}/{name}" for record in product.records().values() for name in record["objects"]}
        assert recorded <= folder.sizes("").keys()
        assert write_parts(begin(folder, arrays), arrays).whole
        assert contents(folder) == unbroken

    def test_an_object_that_is_gone_is_an_error(self, folder: Folder) -> None:
        arrays = ragged(COUNTS)
        product = write_parts(begin(folder, arrays), arrays)
        folder.delete(f"{product.prefix}/embedding/c/1/0")
        for mapped in (None, False):
            with pytest.raises(HdovdError, match=r"embedding/c/1/0.*verify --repair"):
                Rows(product, "embedding", mapped=mapped)
            some = Rows(product, "embedding", mapped=mapped, parts={0, 2})
            np.testing.assert_array_equal(some.read(1, 4), arrays["embedding"][1:4])
        folder.delete(f"{product.prefix}/box/c")
        folder.delete(f"{product.prefix}/offset/zarr.json")
        for name in ("box", "offset"):
            with pytest.raises(HdovdError, match=rf"{name}/.*verify --repair"):
                Product(folder, Level.INSTANCE, product.key).table(name)

    def test_an_object_that_is_cut_short_is_an_error(self, folder: Folder) -> None:
        arrays = ragged(COUNTS)
        product = write_parts(begin(folder, arrays), arrays)
        for name in ("embedding/c/1/0", "box/c/0/0"):
            folder.write(f"{product.prefix}/{name}", folder.read(f"{product.prefix}/{name}")[:-9])
        for mapped in (None, False):
            with pytest.raises(HdovdError, match=r"embedding.*verify --repair"):
                Rows(product, "embedding", mapped=mapped).read(4, 6)
        with pytest.raises(HdovdError, match=r"box.*verify --repair"):
            product.table("box")

    # --- caches ---

    def test_feature_cache(self, url: str, write_cache: Callable[..., Any]) -> None:
        written = write_cache(url, part_rows=4, failed={23: "broken"})
        Catalog.create(url)  # does nothing to what is there
        for cache in (FeatureCache(url), pickle.loads(pickle.dumps(FeatureCache(url, mapped=False)))):
            for image_id in written.image_ids:
                rows = cache.instances(image_id)
                for name, wanted in written.instances[image_id].items():
                    np.testing.assert_array_equal(getattr(rows, name), wanted)
                np.testing.assert_array_equal(cache.image_embedding(image_id), written.images[image_id])
            assert cache.failed() == {23: "broken"}
        catalog = Catalog(url)
        assert {(p.level, p.key) for p in catalog.products()} == set(catalog.sets()["default"].levels.items())
        assert catalog.find(Level.CLASS, "0" * 24) is None
        catalog.write_set("other", FeatureSet({}))
        assert list(catalog.sets()) == ["default", "other"]

    def test_no_cache_and_no_whole_cache(self, url: str, folder: Folder, write_cache: Callable[..., Any]) -> None:
        with pytest.raises(HdovdError, match="no feature cache"):
            FeatureCache(url)
        written = write_cache(url, part_rows=4)
        folder.delete(f"instance/{Catalog(url).sets()['default'].levels[Level.INSTANCE]}/parts/000001.json")
        with pytest.raises(HdovdError, match="1 of 3 parts are missing: run the extract-clip command again"):
            FeatureCache(url)
        assert written.image_ids

    def test_any_zarr_client_reads_it(self, url: str, write_cache: Callable[..., Any]) -> None:
        written = write_cache(url, part_rows=4)
        root: Any = zarr.open_group(
            zarr.storage.FsspecStore.from_url(url, read_only=True) if "://" in url else url, mode="r"
        )
        for level, key in Catalog(url).sets()["default"].levels.items():
            assert root[f"{level}/{key}"].attrs["key_inputs"] == written.inputs[level]
            for name, wanted in written.arrays[level].items():
                np.testing.assert_array_equal(root[f"{level}/{key}/{name}"][:], wanted)

    # ---

    @staticmethod
    def _at_once(calls: list[Callable[[], object]]) -> None:
        """Run all in threads; raises what one of them raised."""
        errors: list[BaseException] = []

        def guarded(call: Callable[[], object]) -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a call hangs"
        if errors:
            raise errors[0]
