"""What is written into a cache comes back, in any order of reading, in one part or many, mapped or not, and through
plain zarr.
"""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from torch.utils.data import DataLoader

from hdovd.cache import SCHEMA_VERSION, TABLE_ARRAYS, Level, key_of
from hdovd.cache.reader import FeatureCache, InstanceRows
from hdovd.cache.schema import ROW_ARRAYS, TOP_ARRAYS

COLUMNS = [name for name in InstanceRows.__slots__ if name not in TOP_ARRAYS]


def _assert_same(cache: FeatureCache, written: Any) -> None:
    for image_id in reversed(written.image_ids):
        rows, wanted = cache.instances(image_id), written.instances[image_id]
        for name in COLUMNS:
            found = getattr(rows, name)
            assert found.dtype == wanted[name].dtype
            np.testing.assert_array_equal(found, wanted[name], err_msg=f"{name} of image {image_id}")
        np.testing.assert_array_equal(cache.instance_embeddings(image_id), wanted["embedding"])
        np.testing.assert_array_equal(cache.image_embedding(image_id), written.images[image_id])


def test_all_levels_come_back(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.levels() == list(Level)
    assert set(COLUMNS) == written.instances[40].keys()
    _assert_same(cache, written)
    assert cache.dim == 8
    assert cache.names(Level.CLASS) == ["cat", "dog", "fire hydrant"]
    assert cache.names(Level.NOUN) == list("abcde")
    for level in (Level.CLASS, Level.NOUN, Level.IMAGE):
        np.testing.assert_array_equal(cache.embeddings(level), written.arrays[level]["embedding"].astype(np.float32))
    np.testing.assert_array_equal(cache.class_embeddings(["dog", "cat"]), cache.embeddings(Level.CLASS)[[1, 0]])
    assert cache.embeddings(Level.CLASS).dtype == np.float32
    assert cache.image_embedding(7).dtype == cache.instances(7).embedding.dtype == np.float16
    assert cache.failed() == {}


def test_base_boxes_and_proposals_are_told_apart(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    rows = FeatureCache(tmp_path / "cache").instances(40)
    wanted = written.instances[40]
    np.testing.assert_array_equal(rows.base_boxes().annotation_id, wanted["annotation_id"][:2])
    np.testing.assert_array_equal(rows.proposals().box, wanted["box"][2:])
    np.testing.assert_array_equal(rows.proposals().embedding, wanted["embedding"][2:])


def test_image_without_rows_is_empty_not_its_neighbours(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    rows = FeatureCache(tmp_path / "cache").instances(19)
    assert rows.embedding.shape == (0, 8)
    assert rows.box.shape == (0, 4)
    assert rows.noun.shape == (0,)


def test_cache_of_only_empty_images(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", {5: (0, 0), 3: (0, 0)})
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache.instances(3).box) == 0
    assert cache.instance_embeddings(5).shape == (0, 8)


def test_without_pseudo_labels_no_row_has_a_noun(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache", levels=[Level.BOXES, Level.INSTANCE, Level.IMAGE, Level.CLASS])
    rows = FeatureCache(tmp_path / "cache").instances(40)
    assert rows.noun.tolist() == [-1] * 5
    assert rows.noun_cosine.tolist() == [0] * 5
    assert rows.top_noun.shape == rows.top_weight.shape == (5, 0)
    np.testing.assert_array_equal(rows.embedding, written.instances[40]["embedding"])


def test_zeros_of_failed_images_come_back_with_the_reason_of_each(
    tmp_path: Path, write_cache: Callable[..., Any]
) -> None:
    """Image 19 has no boxes, so only the image level lacks it; image 40 lies in two parts of the instance level."""
    reasons = {19: "gone.jpg: no such file", 40: "cut.jpg: truncated"}
    written = write_cache(tmp_path / "cache", part_rows=4, failed=reasons)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.failed() == reasons
    assert not cache.image_embedding(19).any()
    assert not cache.instances(40).embedding.any()
    _assert_same(cache, written)


@pytest.mark.parametrize("counts", [(0, 0, 7, 0), (8, 8, 8, 1), (30, 0, 2, 9), (5,) * 12, (16,), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("part_rows", [5, 8], ids=lambda n: f"{n} a part")
def test_rows_over_many_parts(
    tmp_path: Path, write_cache: Callable[..., Any], part_rows: int, counts: tuple[int, ...]
) -> None:
    written = write_cache(
        tmp_path / "cache", {100 + 7 * k: (n, n // 2) for k, n in enumerate(counts)}, part_rows=part_rows
    )
    for mapped in (True, False):
        _assert_same(FeatureCache(tmp_path / "cache", mapped=mapped), written)
    product = tmp_path / "cache" / "instance" / key_of(written.inputs[Level.INSTANCE])
    shards = [f for f in (product / "embedding" / "c").rglob("*") if f.is_file()]
    rows = sum(n + n // 2 for n in counts)
    assert len(shards) == len(list((product / "parts").glob("0*.json"))) == -(-rows // part_rows)


def test_a_row_a_part(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache", {5: (2, 3), 6: (0, 0), 7: (1, 0)}, part_rows=1)
    for mapped in (True, False):
        _assert_same(FeatureCache(tmp_path / "cache", mapped=mapped), written)


def test_part_of_many_chunks(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    """1,024 rows a chunk: two parts of two chunks, and a third that is cut short."""
    written = write_cache(tmp_path / "cache", dict.fromkeys(range(7), (700, 5)), part_rows=2048)
    array = zarr.open_array(
        tmp_path / "cache" / "instance" / key_of(written.inputs[Level.INSTANCE]) / "embedding", mode="r"
    )
    assert (array.shape, array.shards, array.chunks) == ((4935, 8), (2048, 8), (1024, 8))
    for mapped in (True, False):
        _assert_same(FeatureCache(tmp_path / "cache", mapped=mapped), written)


def test_plain_zarr_reads_what_the_schema_says(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    """Every product on its own, and the tree as one group."""
    written = write_cache(tmp_path / "cache", part_rows=4)
    root: Any = zarr.open_group(tmp_path / "cache", mode="r", zarr_format=3)
    assert root.attrs["schema_version"] == SCHEMA_VERSION
    assert set(root.group_keys()) == set(Level)
    for level in Level:
        key = key_of(written.inputs[level])
        product: Any = zarr.open_group(tmp_path / "cache" / level / key, mode="r", zarr_format=3)
        attributes = dict(product.attrs)
        assert attributes["key"] == key
        assert attributes["key_inputs"] == written.inputs[level]
        assert attributes["level"] == level
        assert attributes["schema_version"] == SCHEMA_VERSION
        expected = TABLE_ARRAYS[level] | {name: dtype for name, (dtype, _) in ROW_ARRAYS[level].items()}
        assert {name: array.dtype.name for name, array in product.arrays()} == expected
        for name in expected:
            np.testing.assert_array_equal(product[name][:], written.arrays[level][name])
            np.testing.assert_array_equal(root[f"{level}/{key}/{name}"][:], written.arrays[level][name])
    boxes: Any = root[f"boxes/{key_of(written.inputs[Level.BOXES])}"]
    assert boxes["offset"][:].tolist() == [0, 5, 6, 6, 10]


def test_sets_side_by_side_do_not_touch_each_other(
    tmp_path: Path, write_cache: Callable[..., Any], contents: Callable[..., Any]
) -> None:
    one = write_cache(tmp_path / "cache", seed=1)
    before = contents(tmp_path / "cache")
    other = write_cache(
        tmp_path / "cache",
        {3: (1, 1)},
        seed=2,
        clip={"weights": "w2"},
        features="small",
        inputs={Level.BOXES: {"boxes": {"count": 2}}},
        levels=[Level.BOXES, Level.CLASS, Level.IMAGE, Level.INSTANCE],
    )
    assert before.items() <= contents(tmp_path / "cache").items()
    _assert_same(FeatureCache(tmp_path / "cache"), one)
    small = FeatureCache(tmp_path / "cache", "small")
    assert Level.NOUN not in small.levels()
    np.testing.assert_array_equal(small.instances(3).embedding, other.instances[3]["embedding"])


def test_cache_is_as_readable_as_any_new_folder(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    """A cache is shared between users of a cluster: neither folders nor files may come out with a temporary file's
    private mode.
    """
    write_cache(tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    folder, file = (stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "plain/file"))
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "cache").rglob("*")}
    assert {oct(mode) for p, mode in modes.items() if p.is_dir()} == {oct(folder)}
    assert {oct(mode) for p, mode in modes.items() if p.is_file()} == {oct(file)}


# --- other processes ---


def test_reader_pickles_as_its_path(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(
        tmp_path / "cache",
        seed=1,
        features="other",
        clip={"weights": "w2"},
        inputs={Level.BOXES: {"boxes": {"count": 2}}},
    )
    written = write_cache(tmp_path / "cache", dict.fromkeys(range(50), (40, 0)), features="large")
    cache = FeatureCache(tmp_path / "cache", "large", mapped=False)
    cache.hold(Level.IMAGE)
    cache.hold(Level.INSTANCE)
    packed = pickle.dumps(cache)
    assert len(packed) < 2000  # tables and embeddings are not dragged into every worker
    _assert_same(pickle.loads(packed), written)


@pytest.mark.parametrize(("start", "mapped"), [("fork", True), ("fork", False), ("spawn", None)], ids=str)
def test_reader_in_worker_processes(
    tmp_path: Path, write_cache: Callable[..., Any], start: str, mapped: bool | None
) -> None:
    """A forked worker inherits the reader as it stands, open, with Zarr's threads running; a spawned one unpickles
    it."""
    written = write_cache(tmp_path / "cache", part_rows=4)
    cache = FeatureCache(tmp_path / "cache", mapped=mapped)
    _assert_same(cache, written)
    loader = DataLoader(
        written.image_ids * 5,
        batch_size=None,
        collate_fn=cache.instances,
        num_workers=1,  # type: ignore[arg-type]
        multiprocessing_context=start,
        timeout=60,
    )
    found = list(loader)
    assert len(found) == 20
    for image_id, rows in zip(written.image_ids * 5, found, strict=True):
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(rows, name), written.instances[image_id][name])
    _assert_same(cache, written)  # the parent's handles are still good


def test_more_shards_than_the_process_may_open_files(
    tmp_path: Path, write_cache: Callable[..., Any], python: Callable[..., Any]
) -> None:
    """A map keeps its file open."""
    written = write_cache(
        tmp_path / "cache", dict.fromkeys(range(150), (1, 0)), part_rows=1, levels=[Level.BOXES, Level.INSTANCE]
    )
    code = (
        "import resource as r, sys; r.setrlimit(r.RLIMIT_NOFILE, (100, r.getrlimit(r.RLIMIT_NOFILE)[1]));"
        "from hdovd.cache.reader import FeatureCache; cache = FeatureCache(sys.argv[1], mapped=True);"
        "print(sum(len(cache.instance_embeddings(i)) for i in range(150)))"
    )
    done = python(["-c", code, written.path], tmp_path)
    assert done.stdout.strip() == "150", done.stderr[-2000:]
