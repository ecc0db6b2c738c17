"""Recipes, runs, caches and pictures changed at random, and sealed anew where they are sealed: an error of a line, or
values.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from mutations import mutated
from PIL import Image

from hdovd.cache import Level
from hdovd.cache.identity import SEAL, sealed
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.common.images import decode, read_image
from hdovd.pipelines.runs import RunFolder, read_run

FACTOR = int(os.environ.get("HDOVD_FUZZ", "1"))  # times as many files
COUNT = 30 * FACTOR


def outcomes(count: int, change: Callable[[int], Any], read: Callable[[], Any]) -> Counter[str]:
    """What came of reading what `change` wrote for every seed."""
    found = Counter[str]()
    for seed in range(count):
        change(seed)
        try:
            read()
        except HdovdError as error:
            found["refused"] += 1
            found["long"] += len(str(error)) > 20_000
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            found["read"] += 1
    assert not found.pop("long", 0)
    return found


def test_recipes(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    trees = [load_recipe(name).model_dump(by_alias=True) for name in ("demo", "ov-coco-adamixer-r50")]

    def change(seed: int) -> None:
        tree = mutated(trees[seed % 2], seed, 1 + seed % 3)
        try:
            text = tomli_w.dumps(_without_nulls(tree))
        except (TypeError, ValueError, AttributeError, UnicodeEncodeError):
            text = "x = "
        file.write_text(text, errors="replace")

    found = outcomes(5 * COUNT, change, lambda: load_recipe(str(file)))
    assert min(found["read"], found["refused"]) > 0


def _without_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(value) for value in tree if value is not None] if isinstance(tree, list) else tree


def test_runs(distilled: RunFolder, tmp_path: Path) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    tree = json.loads((run / "run.json").read_text())
    tree["files"] = {}

    def change(seed: int) -> None:
        (run / "run.json").write_text(_sealed(mutated(tree, seed, 1 + seed % 2)))

    def read() -> None:
        read_run(run)
        folder = RunFolder.open(run)
        folder.record(), folder.recipe(), folder.protocol(), folder.class_embeddings()

    found = outcomes(5 * COUNT, change, read)
    assert min(found["read"], found["refused"]) > 0


@pytest.mark.parametrize("kind", ["sets/default.json", "zarr.json", "parts"])
def test_caches(kind: str, copied_cache: Path) -> None:
    product = next((copied_cache / "instance").iterdir())
    product = (
        product if product.is_dir() else next(path for path in (copied_cache / "instance").iterdir() if path.is_dir())
    )
    file = {
        "sets/default.json": copied_cache / kind,
        "zarr.json": product / kind,
        "parts": product / "parts" / "000000.json",
    }[kind]
    tree = json.loads(file.read_text())

    def change(seed: int) -> None:
        file.write_text(_sealed(mutated(tree, seed, 1 + seed % 2)))

    def read() -> None:
        check_cache(CheckConfig(cache=copied_cache))
        cache = FeatureCache(copied_cache)
        cache.require_together()
        cache.failed()
        cache.class_embeddings(cache.names(Level.CLASS))
        cache.instances(int(cache.image_ids()[0]))

    assert outcomes(COUNT, change, read).total() == COUNT


def _sealed(tree: Any) -> str:
    return json.dumps(sealed(tree) if isinstance(tree, dict) and SEAL in tree else tree)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp", "gif", "bmp"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"x.{kind}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(file, exif=exif)
    content = file.read_bytes()

    def change(seed: int) -> None:
        draw, data = random.Random(seed), bytearray(content)
        for _ in range(1 + seed % 4):
            data[draw.randrange(min(len(data), 600))] = draw.randrange(256)
        file.write_bytes(data[: draw.randrange(len(data))] if seed % 5 == 0 else data)

    def read() -> None:
        assert decode(file).pixels.shape[0] == 3
        read_image(file, 20, 30)

    assert outcomes(4 * COUNT, change, read).total() == 4 * COUNT
