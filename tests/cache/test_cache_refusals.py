"""A cache is whole or absent, and a reader refuses what does not fit, naming it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.cache.writer import CacheWriter
from hdovd.errors import HdovdError

INPUTS = {"clip": {"weights": "w1"}}


def _unit(count: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[np.arange(count) % 4]


def _columns(count: int) -> dict[str, np.ndarray]:
    return {"embedding": _unit(count), "box": np.ones((count, 4), np.float32), "source": np.zeros(count, np.uint8),
            "annotation_id": np.arange(count, dtype=np.int64), "score": np.ones(count, np.float32),
            "noun": np.zeros(count, np.int32), "noun_cosine": np.zeros(count, np.float32)}


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


# --- writing ---

@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0, 0.5, 1.01], ids=str)
def test_embedding_that_is_not_normalised_is_refused_with_its_image(tmp_path: Path, value: float) -> None:
    rows = _columns(3)
    rows["embedding"][1] = value, 0, 0, 0
    with pytest.raises(HdovdError, match=r"row 1 of image 81.*norm") as error, CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.instance_level(INPUTS, [80, 81], [1, 3], 4)
        level.append(80, **_columns(1))
        level.append(81, **rows)
    assert "--precision fp32" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_name_embedding_that_is_nan_is_refused_with_its_name(tmp_path: Path) -> None:
    rows = _unit(2)
    rows[1] = np.nan
    with pytest.raises(HdovdError, match="'dog'"), CacheWriter(tmp_path / "cache") as writer:
        writer.write_names(Level.CLASS, INPUTS, ["cat", "dog"], rows)


def test_zero_row_of_a_failed_image_is_allowed(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        level = writer.image_level(INPUTS, [1, 2], 4)
        level.append(1, embedding=np.zeros((1, 4), np.float32))
        level.append(2, embedding=_unit(1))
        level.close({1: "broken"})
    assert not FeatureCache(tmp_path / "cache").image_embedding(1).any()


def test_crash_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        writer.write_names(Level.CLASS, INPUTS, ["cat"], _unit(1))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_crash_while_writing_leaves_an_older_cache_untouched(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    before = _hash(tmp_path / "cache")
    with pytest.raises(RuntimeError), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.instance_level(INPUTS, [1], [2], 4)
        level.append(1, **_columns(2))
        raise RuntimeError
    assert _hash(tmp_path / "cache") == before
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("given", [1, 3], ids=["too few", "too many"])
def test_wrong_row_count_is_refused(tmp_path: Path, given: int) -> None:
    with pytest.raises(HdovdError, match="expected 2 rows of image 1"), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.instance_level(INPUTS, [1], [2], 4)
        level.append(1, **_columns(given))
        level.close({})
    assert list(tmp_path.iterdir()) == []


def test_level_that_was_never_closed_is_refused(tmp_path: Path) -> None:
    """Rows that are still waiting in memory would be lost."""
    with pytest.raises(HdovdError), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.image_level(INPUTS, [1], 4)
        level.append(1, embedding=_unit(1))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("order", [[(2, 1), (1, 2)], [(1, 1), (2, 2)]], ids=["images swapped", "counts swapped"])
def test_rows_under_another_image_than_announced_are_refused(tmp_path: Path, order: list[tuple[int, int]]) -> None:
    """The totals agree, but the offsets would hand one image's rows to another."""
    with pytest.raises((HdovdError, ValueError)), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.instance_level(INPUTS, [1, 2], [2, 1], 4)
        for image_id, count in order:
            level.append(image_id, **_columns(count))
        level.close({})


def test_columns_of_different_length_are_refused(tmp_path: Path) -> None:
    rows = _columns(2)
    rows["box"] = rows["box"][:1]
    with pytest.raises((HdovdError, ValueError)), CacheWriter(tmp_path / "cache") as writer:  # noqa: PT012
        level = writer.instance_level(INPUTS, [1], [2], 4)
        level.append(1, **rows)
        level.close({})


def test_missing_column_is_an_error(tmp_path: Path) -> None:
    rows = _columns(1)
    del rows["noun"]
    with pytest.raises(ValueError, match="noun"), CacheWriter(tmp_path / "cache") as writer:
        writer.instance_level(INPUTS, [1], [1], 4).append(1, **rows)


# --- reading ---

def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="hdovd extract-clip"):
        FeatureCache(tmp_path / "none")


def test_other_schema_version(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    zarr.open_group(tmp_path / "cache", mode="r+").attrs["schema_version"] = 99
    with pytest.raises(HdovdError, match="schema 99"):
        FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize("image_id", [0, 20, 41])
def test_unknown_image(tmp_path: Path, write_cache: Callable[..., Any], image_id: int) -> None:
    write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(HdovdError, match=f"instance.*image {image_id}"):
        cache.instances(image_id)
    with pytest.raises(HdovdError, match=f"level image .*image {image_id}"):
        cache.image_embedding(image_id)


def test_missing_level_names_what_is_there(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", levels=[Level.CLASS, Level.IMAGE])
    cache = FeatureCache(tmp_path / "cache")
    for read in (lambda: cache.instances(7), lambda: cache.key(Level.INSTANCE), lambda: cache.require(Level.INSTANCE, {})):
        with pytest.raises(HdovdError, match=r"no instance level.*image, class"):
            read()


def test_unknown_class_name(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    with pytest.raises(HdovdError, match=r"\['unicorn'\]"):
        FeatureCache(tmp_path / "cache").class_embeddings(["dog", "unicorn"])


def test_edited_metadata_is_noticed(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    file = tmp_path / "cache" / "image" / "zarr.json"
    tree = json.loads(file.read_text())
    tree["attributes"]["key_inputs"]["clip"]["weights"] = "w2"
    file.write_text(json.dumps(tree))
    cache = FeatureCache(tmp_path / "cache")
    asked = {"clip": {"weights": "w2", "activation": "gelu"}}
    for read in (lambda: cache.key_inputs(Level.IMAGE), lambda: cache.require(Level.IMAGE, asked), cache.identity, cache.require_one_clip):
        with pytest.raises(HdovdError, match="edited"):
            read()


def test_require_takes_what_fits_and_names_what_does_not(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    cache.require(Level.INSTANCE, {"boxes": {"count": 9, "hash": "abc"}})
    with pytest.raises(HdovdError, match=r"boxes\.hash differs: expected \"xyz\", the cache has \"abc\"") as error:
        cache.require(Level.INSTANCE, {"boxes": {"count": 9, "hash": "xyz"}})
    assert "boxes.count" not in str(error.value)
    with pytest.raises(HdovdError, match="crop differs"):
        cache.require(Level.INSTANCE, {"crop": "something the cache does not have"})


def test_require_one_clip_names_the_difference(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "same")
    FeatureCache(tmp_path / "same").require_one_clip()
    write_cache(tmp_path / "mixed", class_clip={"weights": "w1", "activation": "quickgelu"})
    with pytest.raises(HdovdError, match=r"clip\.activation") as error:
        FeatureCache(tmp_path / "mixed").require_one_clip()
    assert "clip.weights" not in str(error.value)
    assert "class" in str(error.value)
