"""Losses, gradients and detections against numbers that the authors' released code computed, with the same weights and
inputs.

`reference.json` holds them: a ResNet-50 with AdaMixer's parts made small (`SMALL_SHAPE`), weights of `made_weights`,
two pictures with base boxes near its predictions. Three steps without an optimiser: epoch 1; epoch 2; epoch 2 with
other labels and filled memories.
"""

import re
from collections.abc import Iterator

import pytest
import torch
from adamixer_scenes import (
    DIM,
    SMALL_SHAPE,
    detector,
    made_weights,
    noise,
    pictures,
    published_shapes,
    reference,
    require_same,
    small,
    targets,
    unit,
)
from torch import Tensor

from hdovd.config.recipe import load_recipe
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.boxes import detect_batch
from hdovd.modeling.published_weights import PUBLISHED

CLASSES, BASE, FIRST = 65, 48, 30
FULL_SHAPE = {
    "channels": 256,
    "dim": 512,
    "stages": 6,
    "groups": 4,
    "points": 32,
    "out_points": 128,
    "heads": 8,
    "feedforward": 2048,
    "objectness": 128,
    "adapter": 1024,
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {
        str(PUBLISHED["adamixer"].own_name(name)): value
        for name, value in made_weights(published_shapes(**SMALL_SHAPE)).items()
    }


@pytest.fixture(scope="module")
def model(weights: dict[str, Tensor]) -> AdaMixer:
    made = AdaMixer(small("detector.backbone.name=resnet50"), DIM)
    made.load_state_dict(weights, strict=False)
    made.set_object_text(unit(DIM, seed=5))
    return made


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return 1.7 * noise(CLASSES, DIM, seed=6)


@pytest.fixture(scope="module")
def steps(
    model: AdaMixer, weights: dict[str, Tensor], texts: Tensor
) -> list[tuple[dict, dict[str, float], dict[str, float]]]:
    """What the reference has of each step, then our losses and norms of gradients."""
    model.train()
    done, scene = [], reference()["pictures"]
    images = pictures(*(tuple(one["size"]) for one in scene), first=FIRST)
    for wanted in reference()["steps"]:
        model.load_state_dict(weights, strict=False)  # a step moves the batch norms' statistics
        model.set_object_text(unit(DIM, seed=5))
        model.zero_grad(set_to_none=True)
        model.begin_epoch(wanted["epoch"])
        boxes = [
            targets(
                one["base"], one["pseudo"], [(label + wanted["shift"]) % BASE for label in one["labels"]], one["seed"]
            )
            for one in scene
        ]
        losses = model(images, boxes, texts[:BASE])
        sum(losses.values()).backward()
        norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        done.append((wanted, {name: float(loss.detach()) for name, loss in losses.items()}, norms))
    return done


def test_every_loss_of_every_step(steps: list) -> None:
    for wanted, losses, _ in steps:
        for name, loss in losses.items():
            assert loss == pytest.approx(wanted["losses"].get(name, 0.0), rel=1e-4, abs=1e-7), (wanted["epoch"], name)
        assert wanted["losses"].keys() <= losses.keys()


def test_gradients(steps: list) -> None:
    for wanted, _, norms in steps:
        assert len(wanted["gradient_norms"]) > 15
        for name, norm in wanted["gradient_norms"].items():
            assert norms[str(PUBLISHED["adamixer"].own_name(name))] == pytest.approx(norm, rel=1e-3), (
                wanted["epoch"],
                name,
            )


def test_detections(model: AdaMixer, weights: dict[str, Tensor], texts: Tensor) -> None:
    """To 1e-3 pixels and 1e-4 in score."""
    model.load_state_dict(weights, strict=False)
    model.set_object_text(unit(DIM, seed=5))
    model.eval()
    wanted = reference()
    predictions = model.predict(pictures(*(tuple(one["size"]) for one in wanted["pictures"]), first=FIRST), texts)
    found = detect_batch(predictions, torch.arange(CLASSES) >= BASE, model.recipe.inference)
    require_same(found, wanted)


def own_state(model: AdaMixer) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in model.state_dict().items():
        if not any(re.fullmatch(pattern, name) for pattern in PUBLISHED["adamixer"].anew):
            yield name, tuple(value.shape)


def test_published_names_and_ours_are_one_to_one() -> None:
    """At full size: 665 entries, 146,400,674 parameters. No number is made: the meta device has shapes alone."""
    with torch.device("meta"):
        model = AdaMixer(load_recipe("ov-coco-adamixer-r50", ["detector.backbone.weights=none"]), 512, initialise=False)
    theirs = published_shapes(**FULL_SHAPE)
    assert len(theirs) == 665
    assert {PUBLISHED["adamixer"].own_name(name): shape for name, shape in theirs.items()} == dict(own_state(model))
    assert len({PUBLISHED["adamixer"].own_name(name) for name in theirs}) == 665
    assert sum(p.numel() for p in model.parameters()) == 146_400_674


@pytest.mark.parametrize(
    "name", ["roi_head.bbox_head.0.fc_obj.weight", "rpn_head.conv3.conv.weight", "ema.norms.0.weight", "optimizer"]
)
def test_what_is_not_a_name_of_theirs(name: str) -> None:
    assert PUBLISHED["adamixer"].own_name(name) is None


def test_everything_that_is_not_published_is_named() -> None:
    kept = {name for name, _ in own_state(detector())}
    assert {name for name in kept if "queue" in name or "centroid" in name or name == "object_text"} == set()
