"""`hdovd cache view`: what it prints, the picture it draws, and what it says of ids and data that are not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import Ran
from PIL import Image

from hdovd.cache import Source
from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.pipelines.cache_tools.view import (
    STRONG,
    WEAK,
    CacheView,
    Likeness,
    Reliability,
    ViewRow,
    draw_view,
    row_colour,
)
from hdovd.pipelines.common.drawing import BASE_COLOUR
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip

WEIGHTS = (
    "--recipe",
    "demo",
    "--set",
    "pseudo_boxes.reliability_centre=0.2",
    "--set",
    "pseudo_boxes.reliability_width=0.1",
    "--set",
    "pseudo_boxes.reliability_scale=1.3",
)


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch, hdovd: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    """`hdovd cache view WORDS` in this process, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return partial(hdovd, "cache", "view")


def test_a_table_and_a_picture_for_every_image(
    cache: Path, kept: list[int], view: Callable[..., Ran], untouched: Callable[[Path], Any]
) -> None:
    with untouched(cache):
        ran = view(cache, "--image", f"{kept[3]},{kept[1]}", "--image", kept[3], "--out", "pictures", *WEIGHTS)
    assert ran.code == 0, ran.err
    assert ran.out.count("\nimage ") == 2
    assert ran.out.index(f"image {kept[3]}, ") < ran.out.index(f"image {kept[1]}, ")
    assert "weight = 1.3 * sigmoid((cosine - 0.2) / 0.1), by the recipe" in ran.out
    rows = FeatureCache(cache).instances(kept[3])
    lines = ran.out.split("\nimage ")[1].splitlines()
    assert (
        len([line for line in lines if line.lstrip().split(" ")[0].isdigit() and " proposal " in line])
        == (rows.source == 1).sum()
        > 0
    )
    for image in (kept[1], kept[3]):
        assert f"wrote pictures/{image}.png" in ran.out
        with Image.open(f"pictures/{image}.png") as picture:
            pixels = np.asarray(picture)
        assert (pixels == BASE_COLOUR).all(axis=2).any()
    assert sorted(os.listdir("pictures")) == sorted(f"{i}.png" for i in (kept[1], kept[3]))


def test_images_that_are_not_named(cache: Path, view: Callable[..., Ran]) -> None:
    ran = view(cache)
    assert ran.code == 0, ran.err
    assert len(os.listdir()) == 1
    first = view(cache, "--image", "random:3", "--out", "a").out
    assert view(cache, "--image", "random:3", "--out", "b").out.replace("wrote b/", "wrote a/") == first
    assert len(os.listdir("a")) == 3
    view(cache, "--image", "random:3", "--seed", 1, "--out", "c")
    assert sorted(os.listdir("a")) != sorted(os.listdir("c"))


def test_bad_input_says_what_there_is(
    cache: Path, copied_cache: Path, kept: list[int], view: Callable[..., Ran]
) -> None:
    far = max(kept) + 1_000
    ran = view(cache, "--image", far)
    assert ran.code == 1
    assert f"does not have image {far}" in ran.err
    assert f"{len(kept)} images, ids {min(kept)} to {max(kept)}; " in ran.err
    sets = copied_cache / "sets/default.json"
    tree = json.loads(sets.read_text())
    sets.write_text(json.dumps(sealed(tree | {"skipped": {"image with a side under 32 px": [far]}})))
    assert "it was skipped: image with a side under 32 px" in view(copied_cache, "--image", far).err
    assert "expected an image id" in view(cache, "--image", "first").err
    assert "one file, and 2 images" in view(cache, "--image", f"{kept[0]},{kept[1]}", "--out", "a.png").err
    assert "expected a name that ends in .png" in view(cache, "--out", "a.jpg").err
    assert "give --recipe" in view(cache, "--set", "train.epochs=1").err
    assert "--data /no/such/folder: no such folder" in view(cache, "--data", "/no/such/folder").err
    sets.write_text(json.dumps(sealed(tree | {"made_from": {}})))
    assert "give --data and --protocol" in view(copied_cache).err
    assert os.listdir() == []


def test_an_import_is_seen_with_its_data(
    copied_cache: Path, world: Path, kept: list[int], view: Callable[..., Ran]
) -> None:
    sets = copied_cache / "sets/default.json"
    sets.write_text(json.dumps(sealed(json.loads(sets.read_text()) | {"made_from": {}})))
    ran = view(
        copied_cache, "--data", world, "--protocol", world / "protocol.toml", "--image", kept[0], "--out", "one.png"
    )
    assert ran.code == 0, ran.err
    assert os.listdir() == ["one.png"]


def test_other_data_are_refused(cache: Path, copied_world: Path, view: Callable[..., Ran]) -> None:
    file = copied_world / "annotations/instances_train2017.json"
    tree = json.loads(file.read_text())
    tree["images"] = tree["images"][5:]
    ids = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in ids]
    file.write_text(json.dumps(tree))
    ran = view(cache, "--data", copied_world)
    assert (ran.code, os.listdir()) == (1, [])
    assert "the boxes level" in ran.err
    assert "does not fit this data" in ran.err


def test_a_picture_that_could_not_be_read_is_drawn_grey(
    extraction: Callable[..., ExtractConfig],
    copied_world: Path,
    kept: list[int],
    tmp_path: Path,
    view: Callable[..., Ran],
) -> None:
    name = next(
        i["file_name"]
        for i in json.loads((copied_world / "annotations/instances_train2017.json").read_text())["images"]
        if i["id"] == kept[2]
    )
    (copied_world / "train2017" / name).write_bytes(b"")
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    ran = view(tmp_path / "cache", "--image", kept[2])
    assert ran.code == 0, ran.err
    assert "note: the extraction could not read it: " in ran.out
    assert (Path(f"{kept[2]}.png")).is_file()
    shutil.rmtree(copied_world / "train2017")
    assert "no image folder" in view(tmp_path / "cache", "--image", kept[2]).err


# --- the picture alone ---


def _row(weight: float | None, source: Source = Source.PROPOSAL, left: float = 10) -> ViewRow:
    return ViewRow(
        (left, 10, left + 30, 40),
        source,
        "cat" if source is Source.BASE_BOX else None,
        None,
        0.5,
        (Likeness("dog", 0.3),) if source is Source.PROPOSAL else (),
        0.3,
        weight,
        (Likeness("dog", 0.3),),
    )


def test_the_more_a_label_weighs_the_stronger_its_colour() -> None:
    assert row_colour(_row(0.0), 1.3) == WEAK
    assert row_colour(_row(1.3), 1.3) == STRONG
    assert row_colour(_row(None), None) == STRONG
    greens = [row_colour(_row(w), 1.3)[1] for w in (0.0, 0.4, 0.8, 1.3)]
    assert greens == sorted(greens, reverse=True)
    assert row_colour(_row(None, Source.BASE_BOX), 1.3) == BASE_COLOUR


@pytest.mark.parametrize("size", [(640, 480), (3000, 20), (20, 3000), (1, 1)])
def test_boxes_lie_where_they_are_whatever_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    box = (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)
    view = CacheView(
        7, Path("é.jpg"), size, (replace(_row(1.3), box=box),), (), Reliability(0.2, 0.1, 1.3, "a test"), ()
    )
    sheet = np.asarray(draw_view(view, Image.new("RGB", size, "white")))
    scale = 1000 / max(size)
    there = (sheet[: round(height * scale), : round(width * scale)] == STRONG).all(axis=2).nonzero()
    assert abs(there[1].min() - box[0] * scale) <= 2
    if min(size) > 100:
        assert max(abs(there[1].max() - box[2] * scale), abs(there[0].max() - box[3] * scale)) <= 2


def test_many_boxes_and_none() -> None:
    view = CacheView(7, None, (300, 200), tuple(_row(0.1, left=k) for k in range(150)), (), None, ("a note",) * 5)
    sheet = draw_view(view, None)
    assert draw_view(replace(view, rows=()), None).height < sheet.height < 5_000
