"""Validation between epochs: the figures of `hdovd eval`, and training goes on as if it had not been."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hdovd.core import HdovdError
from hdovd.data import DataPaths, Split
from hdovd.data.targets import Targets
from hdovd.evaluation import Engine
from hdovd.evaluation.coco import AveragePrecision
from hdovd.modeling.boxes import detect
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.evaluation.evaluate import EvalConfig, Validated, Validation, by_shape, evaluate, results
from hdovd.pipelines.runs import RunFolder

CPU = torch.device("cpu")


def _model(run: RunFolder) -> tuple[FasterRCNN, Tensor]:
    texts = run.class_embeddings()
    model = FasterRCNN(run.recipe(), texts.shape[1], initialise=False)
    run.load_model(model)
    return model, texts


def _validation(run: RunFolder, world: Path, **options: Any) -> Validation:
    return Validation(DataPaths(world), run.protocol(), CPU, **options)


def _same(one: AveragePrecision, two: AveragePrecision) -> bool:
    return np.array_equal(one.ap50, two.ap50, equal_nan=True) and np.array_equal(one.ap, two.ap, equal_nan=True)


@pytest.fixture(scope="module")
def validated(distilled: RunFolder, world: Path) -> Validated:
    return _validation(distilled, world).run(*_model(distilled))


@pytest.mark.parametrize("engine", list(Engine))
def test_the_figures_are_those_of_eval(distilled: RunFolder, world: Path, tmp_path: Path, engine: Engine) -> None:
    out = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    expected = evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", engine=engine))
    validation, (model, texts) = _validation(distilled, world, engine=engine), _model(distilled)
    for _ in range(2):  # and again, from the truth that it holds
        found = validation.run(model, texts)
        assert _same(found.combined, expected.combined)
        assert _same(found.split_blind, expected.split_blind)
    assert not _same(found.combined, found.split_blind)
    assert np.nanmax(found.combined.ap) > 0


def test_detections_are_of_the_splits_images_in_order(distilled: RunFolder, world: Path) -> None:
    validation, (model, texts) = _validation(distilled, world, batch_size=1), _model(distilled)
    found, order = validation.run(model, texts).detections, by_shape(validation.split)
    assert order != list(range(len(order)))
    novel = torch.arange(len(texts)) >= len(validation.protocol.base)
    model.eval()
    for image, detections in zip(validation.split.images, found, strict=True):
        expected = detect(
            model.predict([read_pixels(validation.split, image)], texts)[0], novel, model.recipe.inference
        )
        assert len(expected.scores) > 0
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(detections, key), getattr(expected, key))


def test_pictures_of_one_shape_stand_together(distilled: RunFolder, world: Path) -> None:
    split = _validation(distilled, world).split
    shapes = [(100, 50), (50, 100), (200, 100), (60, 60), (100, 50)]
    images = [replace(split.images[0], id=i, width=w, height=h) for i, (w, h) in enumerate(shapes)]
    assert by_shape(Split(images, split.folder, split.annotations, split.coco_ids, split.skips)) == [0, 2, 4, 3, 1]


def test_one_score_alone_is_counted_once(base_only: RunFolder, world: Path) -> None:
    found = _validation(base_only, world).run(*_model(base_only))
    assert found.split_blind is found.combined


def test_results_form_has_every_detection(distilled: RunFolder, world: Path, validated: Validated) -> None:
    split = _validation(distilled, world).split
    rows = results(split, validated.detections)
    assert len(rows) == sum(len(found.scores) for found in validated.detections) > 0
    first = validated.detections[0]
    assert rows[0] == {
        "image_id": split.images[0].id,
        "category_id": split.coco_ids[int(first.labels[0])],
        "score": first.scores[0].item(),
        "bbox": pytest.approx([*first.boxes[0, :2].tolist(), *(first.boxes[0, 2:] - first.boxes[0, :2]).tolist()]),
    }


# --- what training must not notice ---


@pytest.mark.parametrize("workers", [0, 1])
def test_random_states_are_left_alone(distilled: RunFolder, world: Path, workers: int) -> None:
    validation, (model, texts) = _validation(distilled, world, workers=workers), _model(distilled)
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # numpy's global one
    validation.run(model, texts)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))  # type: ignore[arg-type]


def _modes(model: FasterRCNN) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("start", ["training", "evaluating", "mixed"])
def test_modes_are_restored(distilled: RunFolder, world: Path, start: str) -> None:
    model, texts = _model(distilled)
    model.train(start != "evaluating")
    if start == "mixed":
        model.backbone.eval()
    before, seen = _modes(model), []
    model.backbone.register_forward_hook(lambda *_: seen.append(any(_modes(model))))
    _validation(distilled, world).run(model, texts)
    assert _modes(model) == before
    assert seen
    assert not any(seen)  # none in training mode while it ran


def test_modes_and_random_state_are_restored_after_an_error(distilled: RunFolder, copied_world: Path) -> None:
    model, texts = _model(distilled)
    model.train()
    validation = _validation(distilled, copied_world)
    sorted((copied_world / "val2017").iterdir())[4].unlink()
    state = torch.get_rng_state()
    with pytest.raises(HdovdError, match="no such file"):
        validation.run(model, texts)
    assert all(_modes(model))
    assert torch.equal(torch.get_rng_state(), state)


def _step(model: FasterRCNN, texts: Tensor, split: Split, optimizer: torch.optim.Optimizer) -> float:
    """A training step on two validation pictures, their boxes of the first classes as targets."""
    targets = []
    for image in split.images[:2]:
        rows = torch.nn.functional.normalize(torch.randn(len(image.boxes), model.dim), dim=1)
        none = rows[:0]
        targets.append(
            Targets(
                torch.from_numpy(image.boxes),
                torch.from_numpy(image.labels) % 3,
                rows,
                torch.zeros(0, 4),
                none,
                none,
                torch.nn.functional.normalize(torch.randn(model.dim), dim=0),
            )
        )
    losses = model([read_pixels(split, image) for image in split.images[:2]], targets, texts[:3])
    optimizer.zero_grad()
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_training_goes_on_to_the_bit(distilled: RunFolder, world: Path) -> None:
    validation = _validation(distilled, world)

    def trained(*, validated: bool) -> tuple[list[float], dict[str, Tensor]]:
        model, texts = _model(distilled)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9)
        torch.manual_seed(1)
        losses = []
        for _ in range(3):
            if validated:  # before the first step too
                validation.run(model, texts)
            losses.append(_step(model, texts, validation.split, optimizer))
        return losses, model.state_dict()

    (plain, weights), (other, same) = trained(validated=False), trained(validated=True)
    assert other == plain
    assert len(set(plain)) == 3
    assert all(torch.equal(same[name], value) for name, value in weights.items())


# --- precision, bad input ---


def test_a_cpu_counts_in_fp32_whatever_it_was_trained_in(
    distilled: RunFolder, world: Path, tmp_path: Path, validated: Validated
) -> None:
    out = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    config = (out / "config.toml").read_text()
    assert 'precision = "fp32"' in config
    (out / "config.toml").write_text(config.replace('precision = "fp32"', 'precision = "bf16"'))
    model, texts = _model(RunFolder(out, trusted=True))
    found = _validation(distilled, world).run(model, texts)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(found.detections, validated.detections, strict=True))


def test_embeddings_of_other_classes(distilled: RunFolder, world: Path) -> None:
    model, texts = _model(distilled)
    with pytest.raises(HdovdError, match=rf"demo-world has {len(texts)} classes, but there are 4 class embeddings"):
        _validation(distilled, world).run(model, texts[:4])
