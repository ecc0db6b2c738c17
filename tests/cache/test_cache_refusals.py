"""A reader refuses what is not whole or does not fit, and names it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from hdovd.cache import SCHEMA_VERSION, Catalog, FeatureSet, Level, key_of
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError

# --- the folder ---


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"no feature cache at .*hdovd extract-clip"):
        FeatureCache(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("version", "advice"), [(SCHEMA_VERSION + 1, "newer hdovd: update"), (1, "another --cache")])
def test_other_schema_version(tmp_path: Path, write_cache: Callable[..., Any], version: int, advice: str) -> None:
    write_cache(tmp_path / "cache")
    zarr.open_group(tmp_path / "cache", mode="r+").attrs["schema_version"] = version
    for read in (FeatureCache, Catalog, Catalog.create):
        with pytest.raises(HdovdError, match=f"schema {version}, this hdovd reads {SCHEMA_VERSION}: .*{advice}"):
            read(tmp_path / "cache")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"attributes": {}}',
        '{"attributes": {"schema_version": null}}',
        '{"attributes": {"schema_version": "two"}}',
    ],
)
def test_folder_of_another_zarr_array_is_no_cache(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(HdovdError, match="is no feature cache"):
        FeatureCache(tmp_path)


def test_folder_with_something_else_is_never_taken(tmp_path: Path, untouched: Callable[..., Any]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"precious")
    with untouched(tmp_path / "photos"), pytest.raises(HdovdError, match=r"photos is not empty .*mine\.jpg"):
        Catalog.create(tmp_path / "photos")


# --- sets ---


def test_unknown_set_names_the_sets_there_are(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", features="with-captions")
    write_cache(tmp_path / "cache", features="without", levels=[Level.CLASS])
    with pytest.raises(HdovdError, match="no set of features named default; it has with-captions, without"):
        FeatureCache(tmp_path / "cache")
    with pytest.raises(HdovdError, match="named wihtout; it has"):
        FeatureCache(tmp_path / "cache", "wihtout")


def test_cache_without_a_set_says_that_it_is_not_finished(tmp_path: Path) -> None:
    Catalog.create(tmp_path / "cache")
    with pytest.raises(HdovdError, match="has not finished: run the extract-clip command again"):
        FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("lost", "missing"),
    [("000001.json", "1 of 3 parts"), ("000*.json", "3 of 3 parts"), ("tables.json", "")],
    ids=["a part", "all parts", "tables"],
)
def test_set_that_is_not_whole_is_refused_with_what_to_do(
    tmp_path: Path, write_cache: Callable[..., Any], lost: str, missing: str
) -> None:
    written = write_cache(tmp_path / "cache", part_rows=4)
    key = key_of(written.inputs[Level.INSTANCE])
    for record in (tmp_path / "cache" / "instance" / key / "parts").glob(lost):
        record.unlink()
    with pytest.raises(HdovdError, match=f"instance {key} is not whole.*{missing}.*run the extract-clip command again"):
        FeatureCache(tmp_path / "cache")


def test_set_of_a_product_that_was_deleted(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "image" / key_of(written.inputs[Level.IMAGE]))
    with pytest.raises(HdovdError, match=f"no image product {key_of(written.inputs[Level.IMAGE])}; hdovd cache ls"):
        FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"levels": {"instanse": "a"}, "skipped": {}, "made_from": {}}', '{"levels": []}']
)
def test_damaged_set_is_named(tmp_path: Path, write_cache: Callable[..., Any], content: str) -> None:
    write_cache(tmp_path / "cache")
    (tmp_path / "cache" / "sets" / "default.json").write_text(content)
    with pytest.raises(
        HdovdError, match=r"sets/default\.json is damaged.*verify --repair, then its hdovd extract-clip"
    ):
        FeatureCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("zarr.json", "{"),
        ("zarr.json", "{}"),
        ("zarr.json", '{"attributes": {"rows": 3}}'),
        ("parts/000000.json", ""),
        ("parts/000000.json", "{}"),
        ("parts/000000.json", "[]"),
    ],
)
def test_damaged_metadata_of_a_product_is_named(
    tmp_path: Path, write_cache: Callable[..., Any], file: str, content: str
) -> None:
    written = write_cache(tmp_path / "cache")
    name = f"instance/{key_of(written.inputs[Level.INSTANCE])}/{file}"
    (tmp_path / "cache" / name).write_text(content)
    with pytest.raises(HdovdError, match=f"{name} is damaged.*hdovd cache verify --repair"):
        FeatureCache(tmp_path / "cache").failed()


# --- levels and rows ---


@pytest.mark.parametrize("image_id", [0, 20, 41])
def test_unknown_image(tmp_path: Path, write_cache: Callable[..., Any], image_id: int) -> None:
    write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    for read, level in (
        (cache.instances, Level.BOXES),
        (cache.instance_embeddings, Level.INSTANCE),
        (cache.image_embedding, Level.IMAGE),
    ):
        with pytest.raises(HdovdError, match=f"level {level} .*image {image_id}"):
            read(image_id)


def test_missing_level_names_what_is_there(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", levels=[Level.CLASS, Level.IMAGE])
    cache = FeatureCache(tmp_path / "cache")
    for read in (
        lambda: cache.instance_embeddings(7),
        lambda: cache.key(Level.INSTANCE),
        lambda: cache.require(Level.INSTANCE, {}),
    ):
        with pytest.raises(HdovdError, match=r"no instance level.*image, class"):
            read()


def test_unknown_class_name(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    with pytest.raises(HdovdError, match=r"\['unicorn'\]"):
        FeatureCache(tmp_path / "cache").class_embeddings(["dog", "unicorn"])


def test_edited_metadata_is_noticed(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    written = write_cache(tmp_path / "cache")
    file = tmp_path / "cache" / "image" / key_of(written.inputs[Level.IMAGE]) / "zarr.json"
    tree = json.loads(file.read_text())
    tree["attributes"]["key_inputs"]["clip"]["weights"] = "w2"
    file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"zarr\.json is damaged \(it is not what was written"):
        FeatureCache(tmp_path / "cache")
    record = file.parent / "parts" / "tables.json"
    objects = json.loads(record.read_text())
    objects["objects"]["zarr.json"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    record.write_text(json.dumps(objects))  # its checksum was changed with it
    cache = FeatureCache(tmp_path / "cache")
    asked = {"clip": {"weights": "w2", "activation": "gelu"}}
    for read in (
        lambda: cache.key_inputs(Level.IMAGE),
        lambda: cache.require(Level.IMAGE, asked),
        cache.identity,
        cache.require_together,
    ):
        with pytest.raises(HdovdError, match="edited"):
            read()


# --- what fits together ---


def test_require_takes_what_fits_and_names_what_does_not(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    cache.require(Level.INSTANCE, {"boxes": {"count": 9, "hash": "abc"}})
    with pytest.raises(
        HdovdError,
        match=r"instance level of (.|\n)*boxes\.hash differs: expected \"xyz\", the cache has \"abc\"(.|\n)*"
        "hdovd extract-clip",
    ) as error:
        cache.require(Level.INSTANCE, {"boxes": {"count": 9, "hash": "xyz"}})
    assert "boxes.count" not in str(error.value)
    with pytest.raises(HdovdError, match="recipe differs"):
        cache.require(Level.INSTANCE, {"recipe": "something the cache does not have"})


def test_levels_of_one_extraction_belong_together(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache")
    FeatureCache(tmp_path / "cache").require_together()


def test_levels_of_two_clips_do_not_belong_together(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", class_clip={"weights": "w1", "activation": "quickgelu"})
    with pytest.raises(
        HdovdError, match=r"instance and class: clip\.activation differs: expected \"gelu\", .*\"quickgelu\""
    ) as error:
        FeatureCache(tmp_path / "cache").require_together()
    assert "clip.weights" not in str(error.value)
    assert "image" not in str(error.value)


def test_embeddings_of_other_boxes_do_not_belong_to_the_boxes(tmp_path: Path, write_cache: Callable[..., Any]) -> None:
    write_cache(tmp_path / "cache", inputs={Level.BOXES: {"boxes": {"count": 9, "hash": "xyz"}}})
    with pytest.raises(
        HdovdError, match=r"instance and boxes: boxes\.hash differs: expected \"abc\", .*\"xyz\""
    ) as error:
        FeatureCache(tmp_path / "cache").require_together()
    assert "clip" not in str(error.value)


@pytest.mark.parametrize(
    ("level", "inputs"),
    [
        (Level.NOUN, {"clip": {"weights": "w1", "activation": "gelu"}, "names": "others"}),
        (Level.INSTANCE, {"boxes": {"count": 9, "hash": "abc"}, "crop": "wider"}),
    ],
    ids=["nouns", "crops"],
)
def test_pseudo_labels_of_other_nouns_or_crops_do_not_belong(
    tmp_path: Path, write_cache: Callable[..., Any], level: Level, inputs: dict[str, Any]
) -> None:
    """Both sets are whole, and the names of their levels agree: only the keys say that the nouns are rows of another
    table.
    """
    write_cache(tmp_path / "cache")
    other = write_cache(tmp_path / "cache", inputs={level: inputs}, levels=[level], features="other")
    catalog = Catalog(tmp_path / "cache")
    mixed = catalog.sets()["default"].levels | {level: key_of(other.inputs[level])}
    catalog.write_set("mixed", FeatureSet(mixed))
    FeatureCache(tmp_path / "cache").require_together()
    with pytest.raises(HdovdError, match=f"pseudo_label and {level}: it was made from .*the set has {key_of(inputs)}"):
        FeatureCache(tmp_path / "cache", "mixed").require_together()
