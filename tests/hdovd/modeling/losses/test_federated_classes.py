"""Federated annotations: a class that nobody looked for in an image is no negative there, in either detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import adamixer_scenes
import faster_rcnn_scenes
import pytest
import torch
from torch import Tensor

from hdovd.modeling.losses.classwise import classification_loss, of_judged


def test_by_hand() -> None:
    """Two images, three base classes and a pseudo text; background is the last column."""
    logits = torch.arange(20.0).reshape(4, 5)
    judged: list[Tensor | None] = [torch.tensor([True, False, True]), torch.tensor([False, True, False])]
    found = of_judged(logits, judged, torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, False]))
    wanted = logits.clone()
    wanted[0, 1] = wanted[2, 0] = wanted[2, 2] = -torch.inf
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("judged", [[None, None], [], [torch.tensor([True, False, True]), None]])
def test_annotations_that_are_not_federated_leave_logits_as_they_are(judged: list[Tensor | None]) -> None:
    logits = torch.randn(3, 5)
    assert of_judged(logits, judged, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)) is logits


def test_a_class_that_nobody_looked_for_gets_no_gradient_from_background() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    known = of_judged(logits, [torch.tensor([False, True, True])], torch.tensor([0, 0]), torch.tensor([True, False]))
    classification_loss(known, torch.tensor([3, 1]), torch.ones(2)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] == 0
    assert (logits.grad[0, 1:] != 0).all()
    assert (logits.grad[1] != 0).all()  # an object is none of the other classes


SETTINGS = ("loss.class.federated=true",)


def faster_rcnn(*settings: str, known: bool | None) -> dict[str, Tensor]:
    images, targets = faster_rcnn_scenes.batch()
    judged = None if known is None else torch.full((faster_rcnn_scenes.BASE_COUNT,), known)
    return faster_rcnn_scenes.run(
        faster_rcnn_scenes.detector(*settings), images, [replace(t, judged=judged) for t in targets]
    )


def adamixer(*settings: str, known: bool | None) -> dict[str, Tensor]:
    scenes = adamixer_scenes
    model = scenes.detector(*settings).train()
    model.begin_epoch(2)
    judged = None if known is None else torch.full((scenes.BASE,), known)
    targets = scenes.targets([[8.0, 8.0, 60.0, 70.0]], [[40.0, 30.0, 100.0, 90.0]], [1], 7)
    losses: dict[str, Tensor] = model(
        scenes.pictures((96, 128)), [replace(targets, judged=judged)], scenes.unit(scenes.BASE, scenes.DIM, seed=3), [5]
    )
    return losses


@pytest.mark.parametrize("step", [faster_rcnn, adamixer])
def test_a_step_of_a_detector(step: Callable[..., Any]) -> None:
    """Judged by all classes, or not at all, it is the step of before; judged by none, background costs less, and
    nothing else changes.
    """
    plain = step(known=None)
    for same in (step(*SETTINGS, known=None), step(*SETTINGS, known=True), step(known=False)):
        assert {name: value.item() for name, value in same.items()} == {
            name: value.item() for name, value in plain.items()
        }
    found = step(*SETTINGS, known=False)
    assert 0 < found["classification"].item() < plain["classification"].item() - 1e-3
    for name in plain.keys() - {"classification"}:
        assert found[name].item() == plain[name].item()
    sum(found.values()).backward()
