"""Crop recipes: which pixels a box stands for, also at the border, and that cutting them is what Pillow's crop
gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.core import HdovdError
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape
from hdovd.pipelines.embedding.embedders import cut

BOX, SQUARE, INSIDE = Shape


def _regions(shape: Shape, box: Any, *scales: float) -> list[list[int]]:
    """In an image of 64 x 48 pixels."""
    found: list[list[int]] = CropRecipe(shape, scales or (1,)).regions(np.array([box], np.float32), 64, 48).tolist()
    return found


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 30, 40], [10, 20, 30, 40]),
        ([10.2, 20.9, 29.1, 39.01], [10, 20, 30, 40]),
        ([10.2, 20.9, 10.3, 20.95], [10, 20, 11, 21]),  # inside one pixel
        ([0, 0, 64, 48], [0, 0, 64, 48]),
        ([63.5, 47.5, 64, 48], [63, 47, 64, 48]),
        ([64 - 1e-6, 10, 64, 12], [63, 10, 64, 12]),  # 64 in float32
        ([5, 48 - 1e-6, 6, 48], [5, 47, 6, 48]),
    ],
)
def test_a_box_is_widened_to_whole_pixels(box: list[float], expected: list[int]) -> None:
    assert _regions(BOX, box) == [expected]


def test_any_box_gives_pixels_that_hold_it() -> None:
    rng = np.random.default_rng(0)
    x, y = np.sort(rng.uniform(0, 64, (500, 2))), np.sort(rng.uniform(0, 48, (500, 2)))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.float32)
    found = CropRecipe().regions(boxes, 64, 48)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= (64, 48)).all()
    assert (found[:, :2] < found[:, 2:]).all()
    assert (found[:, :2] == np.floor(boxes[:, :2])).all()
    assert ((found[:, 2:] == np.ceil(boxes[:, 2:])) | (found[:, 2:] == found[:, :2] + 1)).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 10, 30, 30], [5, 5, 35, 35]),
        ([0, 0, 20, 10], [0, 0, 25, 13]),  # cut to the image: 25 x 12.5 on two sides
        ([0, 0, 64, 48], [0, 0, 64, 48]),
        ([40, 40, 64, 48], [34, 38, 64, 48]),
    ],
)
def test_context_is_cut_to_the_image(box: list[float], expected: list[int]) -> None:
    assert _regions(BOX, box, 1, 1.5) == [box, expected]


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        (SQUARE, [20, 20, 40, 30], [20, 15, 40, 35]),
        (INSIDE, [20, 20, 40, 30], [20, 15, 40, 35]),
        (SQUARE, [0, 0, 10, 20], [-5, 0, 15, 20]),
        (INSIDE, [0, 0, 10, 20], [0, 0, 20, 20]),
        (SQUARE, [60, 40, 64, 48], [58, 40, 66, 48]),
        (INSIDE, [60, 40, 64, 48], [56, 40, 64, 48]),
        (INSIDE, [0, 4, 60, 8], [0, -24, 60, 36]),  # 60 fits the width, not the height
        (INSIDE, [0, 0, 64, 48], [0, -8, 64, 56]),
        (SQUARE, [10.1, 10.1, 10.2, 10.3], [10, 10, 11, 11]),  # a pixel at least
        (INSIDE, [63.9, 47.9, 64, 48], [63, 47, 64, 48]),
    ],
)
def test_squares(shape: Shape, box: list[float], expected: list[int]) -> None:
    assert _regions(shape, box) == [expected]


def test_scales_of_a_box_stand_together() -> None:
    boxes = np.array([[10, 10, 20, 20], [30, 30, 40, 40]], np.float32)
    found = CropRecipe(SQUARE, (1, 2, 0.5)).regions(boxes, 64, 48)
    assert found.tolist() == [
        [10, 10, 20, 20],
        [5, 5, 25, 25],
        [12, 12, 17, 17],
        [30, 30, 40, 40],
        [25, 25, 45, 45],
        [32, 32, 37, 37],
    ]


def test_no_boxes_have_no_regions() -> None:
    for shape in Shape:
        assert CropRecipe(shape, (1, 1.5)).regions(np.zeros((0, 4), np.float32), 64, 48).shape == (0, 4)


@pytest.mark.parametrize(
    "region",
    [
        (0, 0, 64, 48),
        (10, 5, 30, 47),
        (-8, -3, 10, 12),
        (50, 40, 80, 70),
        (-10, -10, 90, 90),
        (63, 47, 64, 48),
        (-20, 10, -4, 20),
        (70, 50, 80, 60),
    ],
    ids=str,
)
def test_a_cut_is_pillows_crop(region: tuple[int, int, int, int]) -> None:
    """Black outside, as there; also of a region that misses the picture altogether."""
    pixels = np.random.default_rng(0).integers(1, 256, (48, 64, 3), np.uint8)
    found = cut(torch.from_numpy(pixels).permute(2, 0, 1), region)
    assert np.array_equal(found.permute(1, 2, 0), np.asarray(Image.fromarray(pixels).crop(region)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,x", "expected numbers"),
        ("", "expected numbers"),
        ("0", "above 0"),
        ("1,-2", "above 0"),
        ("nan", "above 0"),
        ("1000", "above 0"),
    ],
)
def test_scales_that_are_none(text: str, message: str) -> None:
    with pytest.raises(HdovdError, match=rf"--crop-scales.*{message}"):
        CropRecipe.parse(BOX, text)


def test_a_recipe_comes_back_from_its_inputs() -> None:
    for recipe in (CropRecipe(), CropRecipe(INSIDE, (1, 1.5))):
        assert CropRecipe.from_inputs(recipe.inputs()) == recipe
    with pytest.raises(HdovdError, match="another version"):
        CropRecipe.from_inputs({"recipe": "box", "context_scale": 1.0})
