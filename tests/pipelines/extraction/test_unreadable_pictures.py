"""Pictures that cannot be read: rows of zeros with a reason, left out of training by name, and tried again when
asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import load_protocol, load_split
from hdovd.pipelines.dataloading.loader import Draw
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.training.training_set import TrainingSet

Config = Callable[..., ExtractConfig]
MakeRecipe = Callable[..., Recipe]
MISSING, TRUNCATED, RESIZED, EMPTY, TEXT = 1, 2, 3, 4, 5


def _file(world: Path, image_id: int) -> Path:
    return world / "train2017" / f"{image_id:012d}.jpg"


def _break_pictures(world: Path) -> dict[int, str]:
    """Damage five pictures; returns what the reason of each must hold."""
    _file(world, MISSING).unlink()
    content = _file(world, TRUNCATED).read_bytes()
    _file(world, TRUNCATED).write_bytes(content[: len(content) // 2])
    with Image.open(_file(world, RESIZED)) as picture:
        size = picture.size
        picture.resize((size[0] + 1, size[1])).save(_file(world, RESIZED))
    _file(world, EMPTY).write_bytes(b"")
    _file(world, TEXT).write_text("<html>404</html>")
    return {
        MISSING: "no such file",
        TRUNCATED: "truncated",
        RESIZED: f"{size[0] + 1}x{size[1]}.*{size[0]}x{size[1]}",
        EMPTY: "no picture of a kind",
        TEXT: "no picture of a kind",
    }


def _repair(world: Path, whole: Path, *image_ids: int) -> None:
    for image_id in image_ids:
        _file(world, image_id).write_bytes(_file(whole, image_id).read_bytes())


def _training_set(world: Path, cache: Path, recipe: Recipe, log: Callable[[str], None] = lambda _: None) -> TrainingSet:
    split = load_split(
        world / "annotations" / "instances_train2017.json",
        world / "train2017",
        load_protocol(str(world / "protocol.toml")),
        base_only=True,
    )
    with lines_to(log):
        return TrainingSet(split, FeatureCache(cache), recipe)


def _tables(found: dict[str, str]) -> dict[str, str]:
    """Without what names the folder of the pictures: the set, and the files that they were."""
    return {name: digest for name, digest in found.items() if not name.startswith("sets/") and "/pictures/" not in name}


# --- rows of zeros ---


@pytest.mark.parametrize("part_rows", [65536, 10], ids=lambda n: f"{n} rows a part")
def test_broken_pictures_are_counted_listed_and_left_out_of_training(
    copied_world: Path,
    tmp_path: Path,
    extraction: Config,
    cache: Path,
    kept: list[int],
    micro_recipe: MakeRecipe,
    part_rows: int,
) -> None:
    reasons = _break_pictures(copied_world)
    assert reasons.keys() <= set(kept)
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(tmp_path / "cache", data=copied_world, part_rows=part_rows))
    assert report.whole
    assert report.failed.keys() == reasons.keys()
    for image_id, reason in reasons.items():
        (line,) = [line for line in lines if f"image {image_id}:" in line]
        assert str(_file(copied_world, image_id)) in line
        assert re.search(reason, line)
    assert any("5 images have no embeddings" in line and "--retry-failed" in line for line in lines)
    reader, whole = FeatureCache(tmp_path / "cache"), FeatureCache(cache)
    assert reader.failed() == report.failed
    for image_id in kept:  # the others have their own rows, not their neighbours'
        rows, wanted = reader.instances(image_id), whole.instances(image_id)
        np.testing.assert_array_equal(rows.box, wanted.box)
        if image_id in reasons:
            assert not rows.embedding.any()
            assert not reader.image_embedding(image_id).any()
            assert (rows.noun == -1).all()
            assert not rows.noun_cosine.any()
        else:
            np.testing.assert_array_equal(rows.embedding, wanted.embedding)
            np.testing.assert_array_equal(reader.image_embedding(image_id), whole.image_embedding(image_id))
            np.testing.assert_array_equal(rows.noun, wanted.noun)
    told: list[str] = []
    data = _training_set(copied_world, tmp_path / "cache", micro_recipe(), told.append)
    assert {image.id for image in data.images} == set(kept) - reasons.keys()
    assert any(line.startswith("skipped 5") for line in told)
    for index in range(len(data)):
        assert data[Draw(0, 0, index)][1].embeddings.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


def test_later_run_is_a_hit_that_says_again_what_failed(
    copied_world: Path, tmp_path: Path, extraction: Config, counting: Any, untouched: Callable[..., Any]
) -> None:
    """Also when the pictures were repaired: what changes a cache is asked for."""
    _file(copied_world, MISSING).rename(tmp_path / "aside.jpg")
    first = extract_clip(extraction(tmp_path / "cache", data=copied_world))
    (tmp_path / "aside.jpg").rename(_file(copied_world, MISSING))
    with untouched(tmp_path / "cache"):
        report = extract_clip(extraction(tmp_path / "cache", data=copied_world), counting)
    assert set(report.levels.values()) == {"hit"}
    assert report.failed == first.failed
    assert first.failed.keys() == {MISSING}
    assert counting.batches == []


def test_base_only_training_leaves_the_same_images_out(
    copied_world: Path, tmp_path: Path, extraction: Config, kept: list[int], micro_recipe: MakeRecipe
) -> None:
    """Runs that are compared see the same images."""
    _file(copied_world, MISSING).unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    off = [f"loss.{level}.enabled=false" for level in ("instance", "class", "image")]
    assert {image.id for image in _training_set(copied_world, tmp_path / "cache", micro_recipe(*off)).images} == set(
        kept
    ) - {MISSING}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
def test_no_readable_picture_is_an_error_before_anything_is_written(
    copied_world: Path, tmp_path: Path, extraction: Config, dry_run: bool
) -> None:
    """A wrong --images folder, in most cases."""
    for picture in (copied_world / "train2017").iterdir():
        picture.unlink()
    with pytest.raises(HdovdError, match=r"none of 16 pictures of .*train2017 can be read(.|\n)*no such file"):
        extract_clip(extraction(tmp_path / "folder" / "cache", data=copied_world, dry_run=dry_run))
    assert not (tmp_path / "folder").exists()


# --- trying again ---


@pytest.mark.parametrize("part_rows", [65536, 10], ids=lambda n: f"{n} rows a part")
def test_retry_after_repair_gives_the_bytes_of_whole_pictures(
    copied_world: Path, world: Path, tmp_path: Path, extraction: Config, contents: Callable[..., Any], part_rows: int
) -> None:
    """In parts of 10 rows, an image's crops lie in two of them; and the nouns of its proposals follow."""
    _break_pictures(copied_world)
    config = extraction(tmp_path / "cache", data=copied_world, part_rows=part_rows, retry_failed=True)
    assert extract_clip(config).failed.keys() == {MISSING, TRUNCATED, RESIZED, EMPTY, TEXT}
    _repair(copied_world, world, MISSING, TRUNCATED, RESIZED, EMPTY)
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(config)
    assert report.failed.keys() == {TEXT}
    assert any("tries again what could not be read: 5 images" in line for line in lines)
    _repair(copied_world, world, TEXT)
    assert extract_clip(config).failed == {}
    extract_clip(extraction(tmp_path / "fresh", part_rows=part_rows))
    assert _tables(contents(tmp_path / "cache")) == _tables(contents(tmp_path / "fresh"))
    assert set(extract_clip(config).levels.values()) == {"hit"}


def test_retry_computes_the_rows_of_failed_images_alone(
    copied_world: Path, world: Path, tmp_path: Path, extraction: Config, counting: Any, contents: Callable[..., Any]
) -> None:
    _file(copied_world, MISSING).unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied_world, part_rows=32))
    before = contents(tmp_path / "cache")
    _repair(copied_world, world, MISSING)
    report = extract_clip(extraction(tmp_path / "cache", data=copied_world, part_rows=32, retry_failed=True), counting)
    assert {level for level, decision in report.levels.items() if decision != "hit"} >= {Level.INSTANCE, Level.IMAGE}
    assert counting.pictures == report.new_rows[Level.INSTANCE] + report.new_rows[Level.IMAGE]
    assert report.new_rows[Level.IMAGE] == 1
    assert report.new_rows[Level.INSTANCE] == len(FeatureCache(tmp_path / "cache").instances(MISSING).box)
    assert counting.names == []
    after = contents(tmp_path / "cache")
    changed = {name.rpartition("/")[2] for name in after if after[name] != before.get(name)}
    # Image 1 is the first: part 0 of each level; and the weight of labels has its base boxes too.
    assert changed == {"0", "000000.json", "000000.npz", "default.json"}


def test_retry_of_what_is_still_broken_changes_nothing(
    copied_world: Path, tmp_path: Path, extraction: Config, contents: Callable[..., Any]
) -> None:
    reasons = _break_pictures(copied_world)
    config = extraction(tmp_path / "cache", data=copied_world, retry_failed=True)
    extract_clip(config)
    before = contents(tmp_path / "cache")
    report = extract_clip(config)
    assert report.whole
    assert report.failed.keys() == reasons.keys()
    assert contents(tmp_path / "cache") == before


def test_dry_run_of_a_retry_forgets_nothing(
    copied_world: Path, world: Path, tmp_path: Path, extraction: Config, untouched: Callable[..., Any]
) -> None:
    _file(copied_world, MISSING).unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    _repair(copied_world, world, MISSING)
    with untouched(tmp_path / "cache"):
        report = extract_clip(extraction(tmp_path / "cache", data=copied_world, retry_failed=True, dry_run=True))
    assert report.new_rows[Level.IMAGE] > 0


# --- another extraction ---


def test_zeros_are_not_handed_on(
    copied_world: Path, world: Path, tmp_path: Path, proposals: Path, extraction: Config, counting: Any, kept: list[int]
) -> None:
    """A product that is extended takes over rows of pictures alone that could be read; the others are tried, and may
    fail, anew.
    """
    _file(copied_world, MISSING).unlink()
    _file(copied_world, TEXT).write_text("<html>404</html>")
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    _repair(copied_world, world, MISSING)
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads(proposals.read_text())[2:]))
    changes = {"data": copied_world, "proposals": tmp_path / "fewer.json"}
    report = extract_clip(extraction(tmp_path / "cache", **changes), counting)
    reader = FeatureCache(tmp_path / "cache")
    assert report.levels[Level.INSTANCE] == "extend"
    assert report.new_rows[Level.INSTANCE] == sum(len(reader.instances(i).box) for i in (MISSING, TEXT))
    assert counting.pictures == len(reader.instances(MISSING).box)
    assert reader.instances(MISSING).embedding.any(axis=1).all()
    assert not reader.instances(TEXT).embedding.any()


def test_image_that_failed_in_one_level_alone_does_not_train(
    copied_world: Path,
    world: Path,
    tmp_path: Path,
    proposals: Path,
    extraction: Config,
    kept: list[int],
    micro_recipe: MakeRecipe,
) -> None:
    """The image level is a hit, of a run in which the picture was missing, the instance level is new: the zero
    image embedding must not become a training target."""
    _file(copied_world, MISSING).unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    _repair(copied_world, world, MISSING)
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads(proposals.read_text())[2:]))
    report = extract_clip(extraction(tmp_path / "cache", data=copied_world, proposals=tmp_path / "fewer.json"))
    assert report.levels[Level.IMAGE] == "hit"
    assert report.failed.keys() == {MISSING}
    data = _training_set(copied_world, tmp_path / "cache", micro_recipe())
    assert {image.id for image in data.images} == set(kept) - {MISSING}
    for index in range(len(data)):
        _, targets, image_id = data[Draw(0, 0, index)]
        assert float(targets.image_embedding.norm()) == pytest.approx(1, abs=1e-5), image_id
