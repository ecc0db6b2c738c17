"""How an exported file is set against its model: differences by hand, their scale, and the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from hdovd.config.recipe import InferenceConfig, Recipe
from hdovd.modeling.boxes import Detections
from hdovd.pipelines.export.model import in_percent, largest_difference, made_up_pictures

CONFIG = InferenceConfig(
    alpha=0.0, beta=0.0, distillation_scale=20.0, score_threshold=0.3, nms=0.5, detections_per_image=3
)


def _found(*rows: tuple[float, float, int]) -> Detections:
    """Detections of (left edge, score, label)."""
    boxes = torch.tensor([[x, 0.0, 90.0, 9.0] for x, _, _ in rows]).reshape(-1, 4)
    return Detections(
        boxes, torch.tensor([s for _, s, _ in rows]), torch.tensor([k for _, _, k in rows], dtype=torch.int64)
    )


def test_boxes_are_compared_at_the_scale_of_the_input(micro_recipe: Callable[..., Recipe]) -> None:
    config = micro_recipe("input.short_side=50", "input.long_side=100").input
    scaled = in_percent(_found((8.0, 0.9, 0)), torch.zeros(3, 200, 400, dtype=torch.uint8), config)
    assert scaled.boxes[0].tolist() == pytest.approx([2.0, 0.0, 22.5, 2.25])
    assert scaled.scores.tolist() == pytest.approx([0.9])


def test_a_made_up_picture_is_larger_than_the_input(micro_recipe: Callable[..., Recipe]) -> None:
    config = micro_recipe("input.short_side=800", "input.long_side=1333").input
    assert [tuple(picture.shape) for picture in made_up_pictures(config)] == [
        (3, 110, 150),
        (3, 170, 96),
        (3, 1000, 1400),
    ]


ONE = ((1.0, 0.9, 0), (5.0, 0.5, 1))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ONE, 0.0),
        (ONE[::-1], 0.0),  # as where two scores are nearly equal
        (((1.25, 0.9, 0), (5.0, 0.5, 1)), 0.25),
        (((1.0, 0.9, 0), (5.0, 0.375, 1)), 0.125),
        (((1.0, 0.9, 0), (5.0, 0.5, 0)), 0.2),  # one of another class is no partner
        (((1.0, 0.9, 0),), 0.2),  # above the threshold
        ((), 0.6),
        ((*ONE, (7.0, 0.3125, 2)), 0.0125),
        (
            ((1.0, 0.9, 0), (3.0, 0.625, 0), (4.0, 0.4375, 0)),
            0.325,
        ),  # the other side is full, which excuses (5.0, 0.5, 1) alone
    ],
)
def test_the_largest_difference_by_hand(other: tuple[tuple[float, float, int], ...], expected: float) -> None:
    assert largest_difference(_found(*ONE), _found(*other), CONFIG) == pytest.approx(expected, abs=1e-6)
    assert largest_difference(_found(*other), _found(*ONE), CONFIG) == pytest.approx(expected, abs=1e-6)


def test_numbers_that_are_none_are_no_match() -> None:
    nan = dataclasses.replace(_found(*ONE), scores=torch.tensor([0.9, torch.nan]))
    assert largest_difference(_found(*ONE), nan, CONFIG) == torch.inf
