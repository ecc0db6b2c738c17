"""Pictures are known by their content: one that changed in place is never taken for what it was, and one that moved
is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from hdovd.cache import Catalog, Level
from hdovd.cache.picture_files import PictureFile
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Exif, load_protocol
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.extraction import extract_clip as extract_module
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.training.train import TrainConfig, training_data

Config = Callable[..., ExtractConfig]
CHANGED = 5


def _file(world: Path, image_id: int) -> Path:
    return world / "train2017" / f"{image_id:012d}.jpg"


def _change(file: Path) -> None:
    """Another picture of the same name and size."""
    with Image.open(file) as picture:
        picture.load()
    ImageOps.invert(picture.convert("RGB")).save(file, quality=95)


def _rows(cache: Path, level: Level) -> np.ndarray:
    found = FeatureCache(cache)
    return found.products()[found.levels().index(level)].table("embedding")


def _is_changed(cache: Path, level: Level) -> np.ndarray:
    """(rows,) bool: of image CHANGED."""
    found = FeatureCache(cache)
    product = found.products()[found.levels().index(level)]
    image_id = product.table("image_id")
    return (image_id if level is Level.IMAGE else np.repeat(image_id, np.diff(product.table("offset")))) == CHANGED


def _train(world: Path, cache: Path, recipe: Recipe) -> Any:
    protocol = str(world / "protocol.toml")
    return training_data(
        TrainConfig(
            data=DataPaths(world), cache=cache, out=cache.parent / "run", recipe=recipe, protocol=protocol, device="cpu"
        ),
        load_protocol(protocol),
    )


def test_a_picture_that_changed_in_place_is_found_and_embedded_again_and_no_other(
    copied_world: Path, tmp_path: Path, extraction: Config, counting: Any, micro_recipe: Callable[..., Recipe]
) -> None:
    cache, config = tmp_path / "cache", extraction(tmp_path / "cache", data=copied_world)
    extract_clip(config)
    before = {level: _rows(cache, level) for level in (Level.IMAGE, Level.INSTANCE)}
    _train(copied_world, cache, micro_recipe())
    _change(_file(copied_world, CHANGED))

    with pytest.raises(HdovdError, match=r"1 picture is not what .*cache was made from \(images 5\): another content"):
        _train(copied_world, cache, micro_recipe())
    _train(
        copied_world,
        cache,
        micro_recipe("loss.instance.enabled=false", "loss.class.enabled=false", "loss.image.enabled=false"),
    )
    lines = list[str]()
    assert not check_cache(CheckConfig(cache=cache)).findings
    with lines_to(lines.append):
        assert check_cache(CheckConfig(cache=cache, changes={"data": DataPaths(copied_world)})).findings
    assert any(
        "images 5: expected the pictures that set default was made from, found 1 of another content" in line
        for line in lines
    )

    lines.clear()
    with lines_to(lines.append):
        report = extract_clip(config, counting)
    assert any("1 picture is not what the cache has of the same id and size (images 5)" in line for line in lines)
    assert report.new_rows[Level.IMAGE] == 1
    assert counting.pictures == 1 + _is_changed(cache, Level.INSTANCE).sum()
    fresh = tmp_path / "fresh"
    extract_clip(extraction(fresh, data=copied_world))
    for level, rows in before.items():
        changed = _is_changed(cache, level)
        assert np.array_equal(_rows(cache, level), _rows(fresh, level))
        assert np.array_equal((_rows(cache, level) != rows).any(axis=1), changed)
    _train(copied_world, cache, micro_recipe())
    assert set(extract_clip(config).levels.values()) == {"hit"}
    assert not check_cache(CheckConfig(cache=cache, changes={"data": DataPaths(copied_world)})).findings


def test_another_folder_with_the_same_names_and_sizes_is_no_hit(
    copied_world: Path, tmp_path: Path, extraction: Config
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    shutil.copytree(copied_world, other)
    for file in (other / "train2017").iterdir():
        _change(file)
    one, two = extraction(cache, data=copied_world), extraction(cache, data=other, features="other")
    extract_clip(one)
    report = extract_clip(two)
    assert report.levels[Level.IMAGE] == report.levels[Level.INSTANCE] == "extract"
    for config, data, strange in ((one, copied_world, other), (two, other, copied_world)):
        assert set(extract_clip(config).levels.values()) == {"hit"}
        assert not check_cache(
            CheckConfig(cache=cache, features=config.features, changes={"data": DataPaths(data)})
        ).findings
        found = check_cache(
            CheckConfig(cache=cache, features=config.features, changes={"data": DataPaths(strange)})
        ).findings
        assert [finding.found[:2] for finding in found] == ["23"], (
            f"set {config.features} was made from {data}, and not from {strange}"
        )
    a, b = FeatureCache(cache), FeatureCache(cache, "other")
    assert not (a.embeddings(Level.IMAGE) == b.embeddings(Level.IMAGE)).all(axis=1).any()


def test_files_that_moved_or_were_copied_are_a_hit_and_hashed_once(
    copied_world: Path, tmp_path: Path, extraction: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, moved = tmp_path / "cache", tmp_path / "moved"
    extract_clip(extraction(cache, data=copied_world))
    shutil.copytree(copied_world, moved, copy_function=shutil.copyfile)  # times are new
    annotations = moved / "annotations" / "instances_train2017.json"
    tree = json.loads(annotations.read_text())
    for image in tree["images"]:
        image["file_name"] = f"train2017/{image['file_name']}"
    annotations.write_text(json.dumps(tree))
    config = replace(extraction(cache, data=copied_world), data=DataPaths(None, moved, annotations))
    assert set(extract_clip(config).levels.values()) == {"hit"}
    monkeypatch.setattr(PictureFile, "of", lambda path, *_: pytest.fail(f"{path} was read again"))
    assert set(extract_clip(config).levels.values()) == {"hit"}
    assert len(Catalog(cache).products(Level.INSTANCE)) == 1


def test_other_rules_of_reading_cost_the_pictures_that_they_read_differently(
    copied_world: Path,
    tmp_path: Path,
    extraction: Config,
    monkeypatch: pytest.MonkeyPatch,
    micro_recipe: Callable[..., Recipe],
) -> None:
    """A cache of before there were rules, and one with --exif ignore: of both a picture with an orientation is embedded
    again.
    """
    with Image.open(_file(copied_world, CHANGED)) as picture:
        exif = Image.Exif()
        exif[0x0112] = 3
        picture.save(_file(copied_world, CHANGED), exif=exif, quality=95)
    cache, given = tmp_path / "cache", extract_module.level_inputs

    def before(*args: Any, **kwargs: Any) -> Any:
        return {
            level: {name: inputs[name] for name in inputs if name != "exif"}
            for level, inputs in given(*args, **kwargs).items()
        }

    monkeypatch.setattr(extract_module, "level_inputs", before)
    extract_clip(extraction(cache, data=copied_world, exif=Exif.IGNORE))
    monkeypatch.setattr(extract_module, "level_inputs", given)
    stored, lines = _rows(cache, Level.IMAGE), list[str]()
    with lines_to(lines.append):
        report = extract_clip(extraction(cache, data=copied_world))
    assert report.levels[Level.IMAGE] == report.levels[Level.INSTANCE] == "extend"
    assert report.new_rows[Level.IMAGE] == 1
    assert np.array_equal((_rows(cache, Level.IMAGE) != stored).any(axis=1), _is_changed(cache, Level.IMAGE))
    assert any(line.startswith("1 picture has an EXIF orientation") and "--exif ignore" in line for line in lines)
    with pytest.raises(HdovdError, match=r'was made with --exif apply, and input\.exif is "ignore"'):
        _train(copied_world, cache, micro_recipe("input.exif=ignore"))
    extract_clip(extraction(cache, data=copied_world, exif=Exif.IGNORE))
    assert np.array_equal(_rows(cache, Level.IMAGE), stored)
    _train(copied_world, cache, micro_recipe("input.exif=ignore"))


def test_a_set_with_changed_pictures_is_repaired(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    cache, config = tmp_path / "cache", extraction(tmp_path / "cache", data=copied_world)
    extract_clip(config)
    _change(_file(copied_world, CHANGED))
    extract_clip(config)
    before = _rows(cache, Level.INSTANCE)
    file = cache / "instance" / FeatureCache(cache).key(Level.INSTANCE) / "embedding" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    check_cache(CheckConfig(cache=cache, repair=True))
    extract_clip(config)
    assert np.array_equal(_rows(cache, Level.INSTANCE), before)
