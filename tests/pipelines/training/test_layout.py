"""The layout of convolutions where a network runs: channels of a pixel side by side, in pictures, feature maps and
weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adamixer_micro import recipe as adamixer_recipe
from rtdetr_micro import recipe as rtdetr_recipe
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from hdovd.config.recipe import Recipe
from hdovd.data import DataPaths
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.propose import propose
from hdovd.pipelines.report.report import relations
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.train import TrainConfig, train


@pytest.fixture
def laid_out() -> Iterator[list[bool]]:
    """Of every convolution that ran over a neighbourhood, in order: whether what it read and its weights lie so."""
    found: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            found.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], module.weight)))

    hook = register_module_forward_pre_hook(look)
    yield found
    hook.remove()


def test_evaluating_detecting_and_relating(
    distilled: RunFolder, world: Path, training_cache: Path, laid_out: list[bool], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))  # evaluation writes into it
    for stage in (
        lambda: evaluate(EvalConfig(run=run, data=DataPaths(world), device="cpu")),
        lambda: Detector.from_run(distilled.path, device="cpu")(next((world / "val2017").iterdir())),
        lambda: relations(
            distilled, DataPaths(world).load("train2017", distilled.protocol(), base_only=True), images=4, device="cpu"
        ),
    ):
        laid_out.clear()
        stage()
        assert len(laid_out) > 8
        assert all(laid_out)


@pytest.mark.parametrize("detector", ["faster_rcnn", "adamixer", "rtdetr"])
def test_training_and_validating(
    world: Path,
    training_cache: Path,
    micro_recipe: Callable[..., Recipe],
    tmp_path: Path,
    laid_out: list[bool],
    detector: str,
) -> None:
    """The averaged weights too."""
    recipe = (
        micro_recipe("train.ema=0.9")
        if detector == "faster_rcnn"
        else {"adamixer": adamixer_recipe, "rtdetr": rtdetr_recipe}[detector]("train.ema=0.9", "train.epochs=1")
    )
    train(
        TrainConfig(
            data=DataPaths(world),
            cache=training_cache,
            out=tmp_path / "run",
            recipe=recipe,
            protocol=str(world / "protocol.toml"),
            device="cpu",
            validation=DataPaths(world),
        )
    )
    assert len(laid_out) > 30
    assert all(laid_out)


def test_proposing(world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path, laid_out: list[bool]) -> None:
    job = ProposeConfig(
        data=DataPaths(world),
        out=tmp_path / "p.json",
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        device="cpu",
    )
    propose(job)
    propose(replace(job, out=tmp_path / "q.json", checkpoint=(tmp_path / "p.oln.safetensors",)))
    assert len(laid_out) > 30
    assert all(laid_out)
