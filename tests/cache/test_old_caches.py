"""A cache that was written by the first version of its schema opens in every later one, and a schema that does not says
what to do.

tests/data/cache-schema-2.tar.xz is one that was committed. It is never made anew; what it was made by is kept here:

    python tests/cache/test_old_caches.py tests/data/cache-schema-2.tar.xz
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from hdovd.cache import TABLE_ARRAYS, Catalog, FeatureSet, KeyInputs, Level, Product, RunRecord, key_of
from hdovd.cache.reader import FeatureCache
from hdovd.cache.rows import Rows
from hdovd.cache.schema import ROW_ARRAYS
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError

COMMITTED = Path(__file__).parents[1] / "data" / "cache-schema-2.tar.xz"
KEYS = {
    Level.BOXES: "d3ab4f7f424f0d7383f8d714",
    Level.INSTANCE: "ab09ba8a9106e3d43364ea21",
    Level.IMAGE: "54046b2c5efead4c56c6f194",
    Level.CLASS: "c44d6911ee306b1625393346",
    Level.NOUN: "8b24f2e9855fb44a56b3c208",
    Level.PSEUDO_LABEL: "60b4184f6091a79b47f81c04",
}
FAILED = {30: "b.jpg: broken data stream"}
IMAGES = {
    "image_id": np.array([20, 10, 30]),
    "image_hash": np.array([7, 2**64 - 9, 8], np.uint64),
    "image_size": np.array([[64, 48], [32, 32], [100, 50]], np.int32),
    "offset": np.array([0, 4, 4, 6]),
}
ROWS = {
    "box": np.array(
        [[0, 0, 8, 8], [1.5, 2, 20, 30], [0, 0, 64, 48], [3, 3, 9, 9], [0, 0, 100, 50], [5, 5, 50, 40]], np.float32
    ),
    "source": np.array([0, 0, 1, 1, 0, 1], np.uint8),
    "score": np.array([1, 1, 0.75, 0.5, 1, 0.25], np.float32),
    "annotation_id": np.array([501, 502, -1, -1, 2**40, -1]),
    "noun": np.array([-1, -1, 1, 0, -1, -1], np.int32),
    "noun_cosine": np.array([0, 0, 0.5, -0.25, 0, 0], np.float32),
}
EMBEDDINGS = {
    Level.INSTANCE: [[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [-0.5, 0.5, -0.5, 0.5], [0] * 4, [0] * 4],
    Level.IMAGE: [[0, 0, 1, 0], [0, 0, 0, 1], [0] * 4],
    Level.CLASS: [[0, -1, 0, 0], [0.5, -0.5, 0.5, 0.5]],
    Level.NOUN: [[-1, 0, 0, 0], [0.5, 0.5, 0.5, -0.5]],
}
NAMES = {Level.CLASS: ["cat", "fire hydrant"], Level.NOUN: ["café", "zebra"]}


def _inputs() -> dict[Level, KeyInputs]:
    clip, images, boxes = (
        {"weights_sha256": "ab12", "activation": "gelu"},
        {"count": 3, "hash": "i"},
        {"count": 6, "hash": "b"},
    )
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {
            "images": images,
            "base_boxes": {"count": 3, "hash": "bb"},
            "proposals": {"count": 3, "hash": "p"},
            "boxes": boxes,
        },
        Level.INSTANCE: {
            "clip": clip,
            "preprocessing": {"size": 32},
            "images": images,
            "boxes": boxes,
            "crop": {"context": 1.0},
        },
        Level.IMAGE: {"clip": clip, "preprocessing": {"size": 32}, "images": images},
        Level.CLASS: {"clip": clip, "templates": ["a {}"], "names": NAMES[Level.CLASS], "tokens": "t"},
        Level.NOUN: {"clip": clip, "templates": ["a {}"], "names": NAMES[Level.NOUN], "tokens": "u"},
    }
    inputs = {level: {"schema_version": 2, **own} for level, own in inputs.items()}
    inputs[Level.PSEUDO_LABEL] = {
        "schema_version": 2,
        "instance": key_of(inputs[Level.INSTANCE]),
        "noun": key_of(inputs[Level.NOUN]),
        "offered": "all",
        "sources": "s",
    }
    return inputs


def _arrays(level: Level) -> dict[str, np.ndarray]:
    arrays = IMAGES | ROWS | ({"embedding": np.array(EMBEDDINGS[level], np.float16)} if level in EMBEDDINGS else {})
    return {name: arrays[name] for name in (*TABLE_ARRAYS[level], *ROW_ARRAYS[level])}


def make_cache(path: Path) -> None:
    """Three images, D of 4, 4 rows a part: one image has no boxes, one could not be read."""
    catalog, inputs = Catalog.create(path), _inputs()
    for level, own in inputs.items():
        arrays = _arrays(level)
        rows = len(arrays[next(iter(ROW_ARRAYS[level]), "box")])
        writer = ProductWriter.begin(
            catalog.folder,
            level,
            own,
            rows=rows,
            part_rows=4,
            dim=4 if level in EMBEDDINGS else 0,
            names=NAMES.get(level),
            tables={name: arrays[name] for name in TABLE_ARRAYS[level]},
            made_with={"batch_size": 2},
        )
        for part in range(writer.product.parts):
            start, stop = writer.product.rows_of(part)
            fails = level is Level.IMAGE or (level is Level.INSTANCE and part == 1)
            writer.write_part(
                part, {name: arrays[name][start:stop] for name in ROW_ARRAYS[level]}, FAILED if fails else {}
            )
    features = FeatureSet({level: key_of(own) for level, own in inputs.items()}, {"crowd": [77]}, {"clip": "a clip"})
    catalog.write_set("default", features)
    catalog.record_run(RunRecord("/runs/first", features.levels))


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    with tarfile.open(COMMITTED) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and newer have it
        archive.extractall(tmp_path / "committed")
    return tmp_path / "committed"


def test_the_committed_cache_opens(committed: Path) -> None:
    catalog, cache = Catalog(committed), FeatureCache(committed)
    assert cache.levels() == list(Level)
    assert {level: cache.key(level) for level in Level} == KEYS
    assert {level: cache.key_inputs(level) for level in Level} == _inputs()
    cache.require_together()
    assert cache.failed() == FAILED
    assert (cache.set.skipped, cache.set.made_from) == ({"crowd": [77]}, {"clip": "a clip"})
    assert {level: cache.names(level) for level in NAMES} == NAMES
    assert [(run.path, run.levels) for run in catalog.runs()] == [("/runs/first", KEYS)]
    assert not any(line for level in Level for line in [*Product(catalog.folder, level, KEYS[level]).missing()])
    for mapped in (True, False):
        cache = FeatureCache(committed, mapped=mapped)
        for number, image_id in enumerate(IMAGES["image_id"].tolist()):
            start, stop = IMAGES["offset"][number : number + 2]
            rows = cache.instances(image_id)
            for name, wanted in {**ROWS, "embedding": np.array(EMBEDDINGS[Level.INSTANCE], np.float16)}.items():
                np.testing.assert_array_equal(getattr(rows, name), wanted[start:stop])
                assert getattr(rows, name).dtype == wanted.dtype
            np.testing.assert_array_equal(cache.image_embedding(image_id), EMBEDDINGS[Level.IMAGE][number])
        np.testing.assert_array_equal(cache.class_embeddings(["fire hydrant"]), EMBEDDINGS[Level.CLASS][1:])


def test_the_committed_cache_is_mapped(committed: Path) -> None:
    assert Rows(Product(Catalog(committed).folder, Level.INSTANCE, KEYS[Level.INSTANCE]), "embedding").mapped


def test_todays_writer_goes_on_where_the_committed_cache_ends(committed: Path, tmp_path: Path) -> None:
    """The same keys and values; of the same bytes, Zarr's metadata aside, whose text is Zarr's business."""
    make_cache(tmp_path / "today")
    for level, key in KEYS.items():
        old, new = (
            Product(Catalog(committed).folder, level, key),
            Product(Catalog(tmp_path / "today").folder, level, key),
        )
        assert old.attributes == new.attributes
        assert old.records().keys() == new.records().keys()
        for name in new.folder.sizes(f"{level}/{key}"):
            if "/c/" in name:
                assert old.folder.read(name) == new.folder.read(name)
        for name, wanted in _arrays(level).items():
            np.testing.assert_array_equal(old.array(name)[:], wanted)
            assert (old.array(name).chunks, old.array(name).shards) == (new.array(name).chunks, new.array(name).shards)


@pytest.mark.parametrize(
    ("version", "advice"), [(1, "give another --cache and extract it again"), (99, "newer hdovd: update this one")]
)
def test_other_schemas(committed: Path, version: int, advice: str) -> None:
    zarr.open_group(committed, mode="r+").attrs["schema_version"] = version
    for use in (FeatureCache, Catalog, Catalog.create):
        with pytest.raises(HdovdError, match=rf"committed has cache schema {version}, this hdovd reads 2: .*{advice}"):
            use(committed)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        make_cache(Path(made))
        with tarfile.open(sys.argv[1], "w:xz") as archive:
            for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
                entry = tarfile.TarInfo(file.relative_to(made).as_posix())
                entry.size = file.stat().st_size
                archive.addfile(entry, io.BytesIO(file.read_bytes()))
    print(json.dumps({level: key_of(own) for level, own in _inputs().items()}))
