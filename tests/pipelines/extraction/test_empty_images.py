"""Images without objects that a protocol keeps go through extraction, training from a cache and from tar shards, and
evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from adamixer_micro import recipe as adamixer_recipe

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import PLAIN
from hdovd.pipelines.training.train import TrainConfig, train

ADAMIXER = ("pseudo_boxes.from_epoch=1", "train.epochs=1", "train.batch_size=1", "train.precision=fp32")


@pytest.fixture
def protocol(copied_world: Path) -> Path:
    """The world's, that keeps what is empty; some training images and one for validation hold no object at all."""
    for split, emptied in (("train", 4), ("val", 1)):
        file = copied_world / "annotations" / f"instances_{split}2017.json"
        tree = json.loads(file.read_text())
        gone = {image["id"] for image in tree["images"][2 : 2 + emptied]}
        tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] not in gone]
        file.write_text(json.dumps(tree))
    protocol = copied_world / "protocol.toml"
    protocol.write_text(protocol.read_text() + "\nkeep_empty_train = true\nkeep_empty_val = true\n")
    return protocol


def _empty(world: Path) -> set[int]:
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    return {i["id"] for i in tree["images"]} - {a["image_id"] for a in tree["annotations"] if a["category_id"] in base}


def _losses(run: RunFolder) -> list[float]:
    return [
        value
        for entry in run.entries()
        for key, value in entry.items()
        if key not in PLAIN and not key.startswith("val_")
    ]


def test_empty_images_are_embedded_trained_and_evaluated_on(
    protocol: Path, extraction: Callable[..., ExtractConfig], tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    world, cache = protocol.parent, tmp_path / "cache"
    extract_clip(extraction(cache, data=world))
    reader, empty = FeatureCache(cache), _empty(world)
    assert len(empty) >= 4
    for image_id in empty:
        assert abs(float((reader.image_embedding(image_id).astype("float32") ** 2).sum()) - 1) < 0.01
        assert not len(reader.instances(image_id).base_boxes().box)
    data = DataPaths(world)
    job = TrainConfig(
        data=data,
        cache=cache,
        out=tmp_path / "run",
        recipe=micro_recipe("train.batch_size=1"),
        protocol=str(protocol),
        device="cpu",
    )
    run = train(job)
    ada = train(replace(job, out=tmp_path / "ada", recipe=adamixer_recipe(*ADAMIXER)))
    for one in (run, ada):
        assert _losses(one)
        assert all(map(math.isfinite, _losses(one)))
    export_tars(ExportConfig(cache=cache, out=tmp_path / "tars", data=data))
    tarred = train(replace(job, data=DataPaths(), cache=tmp_path / "tars", out=tmp_path / "tarred"))
    assert sum(1 for _ in tarred.entries()) == sum(1 for _ in run.entries())
    found = evaluate(EvalConfig(run=run.path, data=data, device="cpu"))
    assert len(found.detections) == 8
    plain = protocol.with_name("plain.toml")
    plain.write_text(protocol.read_text().replace("keep_empty_val = true", ""))
    assert len(evaluate(EvalConfig(run=run.path, data=data, device="cpu", protocol=str(plain))).detections) == 7


def test_a_cache_that_was_made_without_them_says_so(
    world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    protocol = tmp_path / "protocol.toml"
    protocol.write_text((world / "protocol.toml").read_text() + "\nkeep_empty_train = true\n")
    with pytest.raises(HdovdError, match="extract-clip"):
        train(
            TrainConfig(
                data=DataPaths(world),
                cache=training_cache,
                out=tmp_path / "run",
                recipe=micro_recipe(),
                protocol=str(protocol),
                device="cpu",
            )
        )
    assert Level.IMAGE in FeatureCache(training_cache).levels()
