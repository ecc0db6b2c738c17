"""What is written into a cache comes back, in any order of reading, in one shard or many, and through plain zarr."""

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

import hdovd.cache.writer
from hdovd.cache.identity import key_of
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import INSTANCE_COLUMNS, SCHEMA_VERSION, Level

HALF = 5e-4  # float16's relative step is 2^-11


def _assert_same(cache: FeatureCache, written: Any) -> None:
    for image_id in reversed(written.image_ids):
        rows, wanted = cache.instances(image_id), written.instances[image_id]
        for name in INSTANCE_COLUMNS:
            found = getattr(rows, name)
            assert found.dtype == wanted[name].dtype
            np.testing.assert_array_equal(found, wanted[name], err_msg=f"{name} of image {image_id}")
        np.testing.assert_allclose(rows.embedding, wanted["embedding"], atol=HALF)
        np.testing.assert_allclose(cache.image_embedding(image_id), written.images[image_id][0], atol=HALF)


def test_all_levels_come_back(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.levels() == list(Level)
    _assert_same(cache, written)
    assert cache.dim == 8
    assert cache.names(Level.CLASS) == ["cat", "dog", "fire hydrant"]
    np.testing.assert_allclose(cache.embeddings(Level.CLASS), written.classes, atol=HALF)
    np.testing.assert_array_equal(cache.class_embeddings(["dog", "cat"]), cache.embeddings(Level.CLASS)[[1, 0]])
    assert cache.embeddings(Level.CLASS).dtype == cache.image_embedding(7).dtype == cache.instances(7).embedding.dtype == np.float32
    assert cache.failed() == {19: "gone.jpg: no such file"}


def test_base_boxes_and_proposals_are_told_apart(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    rows = FeatureCache(tmp_path / "cache").instances(40)
    wanted = written.instances[40]
    np.testing.assert_array_equal(rows.base_boxes().annotation_id, wanted["annotation_id"][:2])
    np.testing.assert_array_equal(rows.proposals().box, wanted["box"][2:])
    np.testing.assert_allclose(rows.proposals().embedding, wanted["embedding"][2:], atol=HALF)


def test_image_without_rows_is_empty_not_its_neighbours(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    rows = FeatureCache(tmp_path / "cache").instances(19)
    assert rows.embedding.shape == (0, 8)
    assert rows.box.shape == (0, 4)
    assert rows.noun.shape == (0,)


def test_cache_of_only_empty_images(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", {5: (0, 0), 3: (0, 0)})
    assert len(FeatureCache(tmp_path / "cache").instances(3).box) == 0


@pytest.mark.parametrize("counts", [(0, 0, 7, 0), (8, 8, 8, 1), (30, 0, 2, 9), (5,) * 12], ids=str)
def test_rows_over_many_shards(tmp_path: Path, write_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
                               counts: tuple[int, ...]) -> None:
    monkeypatch.setattr(hdovd.cache.writer, "SHARD_ROWS", 8)
    monkeypatch.setattr(hdovd.cache.writer, "CHUNK_ROWS", 4)
    written = write_cache(tmp_path / "cache", {100 + 7 * k: (n, n // 2) for k, n in enumerate(counts)})
    _assert_same(FeatureCache(tmp_path / "cache"), written)
    array = zarr.open_array(tmp_path / "cache" / "instance" / "embedding", mode="r")
    assert array.shards == (8, 8)
    shards = [f for f in (tmp_path / "cache" / "instance" / "embedding" / "c").rglob("*") if f.is_file()]
    assert len(shards) == -(-array.shape[0] // 8)


def test_plain_zarr_reads_what_the_schema_says(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    root = zarr.open_group(tmp_path / "cache", mode="r", zarr_format=3)
    assert root.attrs["schema_version"] == SCHEMA_VERSION
    instance: Any = root["instance"]
    assert instance.attrs["key"] == key_of(written.inputs[Level.INSTANCE])
    assert instance.attrs["key_inputs"] == written.inputs[Level.INSTANCE]
    assert instance["image_id"][:].tolist() == written.image_ids
    assert instance["offset"][:].tolist() == [0, 5, 6, 6, 10]
    assert {name: (instance[name].dtype.name, instance[name].shape[1:]) for name in INSTANCE_COLUMNS} == INSTANCE_COLUMNS
    for level in Level:
        stored: Any = root[f"{level}/embedding"]
        assert stored.dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(stored[:].astype(np.float32), axis=1), 1, atol=1e-3)


def test_writing_again_replaces_the_old_cache_whole(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", seed=1)
    written = write_cache(tmp_path / "cache", {3: (1, 1)}, seed=2, levels=[Level.CLASS, Level.IMAGE, Level.INSTANCE])
    cache = FeatureCache(tmp_path / "cache")
    assert Level.NOUN not in cache.levels()
    _assert_same(cache, written)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_cache_is_as_readable_as_any_new_folder(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    """A cache is shared between users of a cluster: it must not come out with a temporary folder's private mode."""
    write_cache(tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    mode = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "cache")}
    assert oct(mode["cache"]) == oct(mode["plain"])


def test_reader_pickles_as_its_path(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    cache.instances(40)
    packed = pickle.dumps(cache)
    assert len(packed) < 2000  # tables and embeddings are not dragged into every worker
    _assert_same(pickle.loads(packed), written)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_reader_in_data_loader_workers(tmp_path: Path, write_cache: Callable[..., Any], start: str) -> None:
    written = write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    cache.instances(40)  # zarr's threads run in the parent now
    loader = DataLoader(written.image_ids * 5, batch_size=None, collate_fn=cache.instances, num_workers=1,  # type: ignore[arg-type]
                        multiprocessing_context=start, timeout=60)
    found = list(loader)
    assert len(found) == 20
    for image_id, rows in zip(written.image_ids * 5, found, strict=True):
        np.testing.assert_array_equal(rows.box, written.instances[image_id]["box"])
        np.testing.assert_allclose(rows.embedding, written.instances[image_id]["embedding"], atol=HALF)
