"""Every stage on a GPU that is not there: no operation mixes devices (the fixture looks), results are those of a CPU,
and of numbers that are not whole the CPU computes only what is meant to be computed there. (`calibrate` reads a cache
and knows no device.)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import adamixer_micro
import numpy as np
import pytest
import rtdetr_micro
from pretended_cuda import PretendedCuda

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.detection.detect import DetectConfig, detect
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, DenseRecipe
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.proposal_files.file import read_table
from hdovd.pipelines.proposals.config import Detector, ProposeConfig
from hdovd.pipelines.proposals.propose import propose
from hdovd.pipelines.relabelling.config import RelabelConfig
from hdovd.pipelines.relabelling.relabel import relabel
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import PLAIN, load_checkpoint
from hdovd.pipelines.training.train import TrainConfig, train

BEGIN_WITH = {"uniform_", "normal_", "fill_", "zero_", "mul", "random_"}  # weights are drawn before they are moved
ANCHORS = {"anchor_utils.py", "rpn.py"}  # the few of one cell, when the network is built
DIRECTIONS = {"rtdetr": {"DeformableAttention", "GridSampling"}}  # likewise, of the detector that has them
SAMPLES = {"training_set.py", "targets.py", "loader.py", "identities.py"}  # read and prepared before they are moved
# Of what was read from a file: texts of backgrounds, whether there are rows, a text of "object", values that are not
# finite, the values that were written.
LOADED = {"FeatureQueue", "base.py", "detector.py", "folder.py", "tensors.py", "train.py"}
LOSSES = {"LossWindow"}  # looked at every 50 steps
OF_NETWORKS = {
    "convolution",
    "addmm",
    "bmm",
    "baddbmm",
    "_softmax",
    "native_layer_norm",
    "native_batch_norm",
    "relu",
    "gelu",
    "sigmoid",
    "roi_align",
    "topk",
    "_scaled_dot_product_flash_attention_for_cpu",
}
Micro = Callable[..., Recipe]
RECIPES: dict[str, Callable[[Micro], Recipe]] = {
    "faster_rcnn": lambda micro: micro(),
    "faster_rcnn in bf16": lambda micro: micro("train.precision=bf16", "train.optimizer=sgd", "train.clip_norm=0.0"),
    "adamixer": lambda _: adamixer_micro.recipe("pseudo_boxes.from_epoch=1"),
    "rtdetr": lambda _: rtdetr_micro.recipe("pseudo_boxes.from_epoch=1"),
}


def on_host(cuda: PretendedCuda) -> set[str]:
    """The files (of the training loop, of memories and of decoders the classes) in which the CPU computed with numbers
    that are not whole; forgotten then. Nowhere are they those of a network.
    """
    assert not {operation.split(".")[1] for operation, _ in cuda.on_host} & OF_NETWORKS
    places = {where for operation, where in cuda.on_host if operation.split(".")[1] not in BEGIN_WITH}
    cuda.forget()
    return {
        where.partition(" ")[2].partition(".")[0]
        if where.startswith(("loop.py", "distributed.py", "network.py"))
        else where.partition(":")[0]
        for where in places
    }


def losses_of(run: RunFolder) -> list[float]:
    return [value for name, value in run.entries()[0].items() if name not in PLAIN and not name.startswith("val_")]


def found_in(file: Path) -> list[list[float]]:
    """Of detections: category, score and box."""
    return [[entry["category_id"], entry["score"], *entry["bbox"]] for entry in json.loads(file.read_text())]


@pytest.mark.parametrize("name", RECIPES)
def test_train_eval_and_detect(
    name: str,
    world: Path,
    training_cache: Path,
    micro_recipe: Micro,
    clip: str,
    tmp_path: Path,
    pretended_cuda: PretendedCuda,
) -> None:
    recipe, data, built = RECIPES[name](micro_recipe), DataPaths(world), ANCHORS | DIRECTIONS.get(name, set())
    job = TrainConfig(
        data=data,
        cache=training_cache,
        out=tmp_path / "cuda",
        recipe=recipe,
        protocol=str(world / "protocol.toml"),
        validation=data,
    )
    run = train(job)
    assert not pretended_cuda.mixed
    assert on_host(pretended_cuda) <= built | SAMPLES | LOSSES | LOADED
    assert load_checkpoint(run.path)["optimizer"]["state"]  # type: ignore[index]
    on_cpu = train(replace(job, out=tmp_path / "cpu", device="cpu"))
    np.testing.assert_allclose(
        losses_of(run), losses_of(on_cpu), rtol=0.05 if recipe.train.precision == "bf16" else 0.01
    )

    pretended_cuda.forget()
    evaluate(EvalConfig(run=run.path, data=data, pictures=1))
    assert on_host(pretended_cuda) <= built | LOADED | {"evaluate.py"}
    found = found_in(run.path / "detections.json")
    evaluate(EvalConfig(run=run.path, data=data, device="cpu"))
    if recipe.train.precision == "fp32":
        np.testing.assert_allclose(found, found_in(run.path / "detections.json"), atol=0.02)

    pretended_cuda.forget()
    result = detect(
        DetectConfig(run=run.path, images=(str(world / "val2017"),), out=tmp_path / "found", clip=clip, threshold=0.0)
    )
    assert result.images
    assert on_host(pretended_cuda) <= built | LOADED | {"detector.py", "names.py", "detect.py"}

    cache = Path(shutil.copytree(training_cache, tmp_path / "cache"))
    relabel(RelabelConfig(run=run.path, cache=cache))
    assert not pretended_cuda.mixed
    relabel(RelabelConfig(run=run.path, cache=cache, device="cpu", out=tmp_path / "cpu.json", features="cpu"))
    scores, on_cpu_too = (read_table(file).score for file in (run.path / "relabelled.json", tmp_path / "cpu.json"))
    np.testing.assert_allclose(np.sort(scores), np.sort(on_cpu_too), atol=0.02)


def test_a_run_goes_on_where_it_was(
    world: Path, training_cache: Path, micro_recipe: Micro, tmp_path: Path, pretended_cuda: PretendedCuda
) -> None:
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "broken",
        recipe=micro_recipe("train.epochs=2"),
        protocol=str(world / "protocol.toml"),
    )
    whole = train(replace(job, out=tmp_path / "whole"))

    class Killed(Exception):
        """After the first epoch."""

    def log(line: str) -> None:
        if "epoch 2" in line:
            raise Killed

    with pytest.raises(Killed), lines_to(log):
        train(job)
    resumed = train(replace(job, resume=True))
    assert [entry["step"] for entry in resumed.entries()] == [entry["step"] for entry in whole.entries()]
    np.testing.assert_array_equal(losses_of(resumed), losses_of(whole))


@pytest.mark.parametrize("detector", Detector)
def test_propose(
    detector: Detector, world: Path, micro_recipe: Micro, tmp_path: Path, pretended_cuda: PretendedCuda
) -> None:
    job = ProposeConfig(
        data=DataPaths(world),
        out=tmp_path / "cuda.json",
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        top=4,
        detector=(detector,),
    )
    found = propose(job)
    assert on_host(pretended_cuda) <= ANCHORS | SAMPLES | LOSSES | LOADED | {
        "networks.py",
        "propose.py",
        "boxes.py",
        "selection.py",
    }
    on_cpu = propose(replace(job, out=tmp_path / "cpu.json", device="cpu"))
    assert found.keys() == on_cpu.keys()


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        (PLAIN_BOX, Precision.BF16),
        (CropRecipe(scales=(1.0, 1.5)), Precision.FP32),
        (DenseRecipe(64), Precision.FP32),
        (DenseRecipe(64), Precision.BF16),
    ],
    ids=["crops in bf16", "two crops", "dense", "dense in bf16"],
)
def test_extract(
    recipe: CropRecipe | DenseRecipe,
    precision: Precision,
    extraction: Callable[..., object],
    kept: list[int],
    tmp_path: Path,
    pretended_cuda: PretendedCuda,
) -> None:
    caches = []
    for device in ("auto", "cpu"):
        extract_clip(
            extraction(tmp_path / device, device=device, recipe=recipe, precision=precision, batch_size=16, workers=0)
        )
        caches.append(FeatureCache(tmp_path / device))
        if device == "auto":
            assert on_host(pretended_cuda) <= {
                "openclip.py",
                "pseudo_labels.py",
                "label_weights.py",
                "dense.py",
            }  # a mask; labels, of proposals and of base boxes; coordinates
    for image_id in kept:
        one, two = (cache.instances(image_id).embedding.astype(np.float64) for cache in caches)
        assert (one * two).sum(axis=1).min() > (0.999 if precision is Precision.FP32 else 0.98)
        assert float(caches[0].image_embedding(image_id) @ caches[1].image_embedding(image_id)) > 0.98
    assert caches[0].embeddings(Level.CLASS).shape == caches[1].embeddings(Level.CLASS).shape
