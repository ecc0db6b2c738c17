"""Every crop recipe, from file to embedding, against open_clip's own preprocessing of the crop that Pillow cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from online_clip import reference_transform
from PIL import Image

from hdovd.data import ImageBoxes
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape
from hdovd.pipelines.embedding.embedders import Crops, PartRows, Pictures, embed, mean_of
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

WIDTH, HEIGHT, BATCH = 320, 240, 48
RECIPES = [CropRecipe(), CropRecipe(Shape.SQUARE), CropRecipe(Shape.SQUARE_INSIDE), CropRecipe(Shape.BOX, (1, 1.5))]


def _boxes() -> np.ndarray:
    """500: of a pixel and less, the whole picture, thin ones, ones at the border, and any."""
    rng = np.random.default_rng(0)
    tiny = rng.uniform(0, (WIDTH - 3, HEIGHT - 3), (100, 2))
    special = [
        [0, 0, WIDTH, HEIGHT],
        [0.5, 0.5, WIDTH - 0.5, HEIGHT - 0.5],
        [0, 0, 1, 1],
        [WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT],
    ]
    thin = [[x, 0, x + 1.5, HEIGHT] for x in range(0, WIDTH - 2, 8)] + [
        [0, y, WIDTH, y + 1.5] for y in range(0, HEIGHT - 2, 8)
    ]
    border = [[0, y, 60, y + 50] for y in range(0, 190, 5)] + [
        [x, HEIGHT - 40, x + 70, HEIGHT] for x in range(0, 250, 5)
    ]
    listed = np.concatenate(
        [np.concatenate([tiny, tiny + rng.uniform(0.1, 3, (100, 2))], axis=1), special, thin, border]
    )
    ends = np.sort(rng.uniform(0, 1, (500 - len(listed), 2, 2)), axis=1)
    ends[:, 1] = np.maximum(ends[:, 1], ends[:, 0] + 0.01)
    anywhere = np.clip(ends.reshape(-1, 4), 0, 1) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    return np.concatenate([listed, anywhere]).astype(np.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph's smoothness with some noise, as JPEG."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(smooth) + rng.normal(0, 8, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    file = tmp_path_factory.mktemp("picture") / "1.jpg"
    Image.fromarray(pixels).save(file, quality=92)
    return file


def _ours(
    clip: ClipTeacher, picture: Path, recipe: CropRecipe, boxes: np.ndarray, batch: int = BATCH, workers: int = 0
) -> np.ndarray:
    image = ImageBoxes(1, picture.name, WIDTH, HEIGHT, boxes, np.zeros(len(boxes), np.int64), np.arange(len(boxes)))
    way = Crops(clip, Pictures([image], lambda _: picture, np.array([0, len(boxes)]), boxes), recipe)
    wanted = [*PartRows(way, 0, np.zeros(0), np.ones(len(boxes), bool)).batches(batch)]
    answers = embed(wanted, {way.level: way}, clip.device, workers)
    return np.concatenate([answer[0][: w.jobs[0].rows] for w, answer in zip(wanted, answers, strict=True)])


def _reference(clip: ClipTeacher, picture: Path, recipe: CropRecipe, boxes: np.ndarray) -> np.ndarray:
    image, transform = Image.open(picture).convert("RGB"), reference_transform(clip)
    crops = [transform(image.crop(region)) for region in recipe.regions(boxes, WIDTH, HEIGHT).tolist()]
    rows = [clip.embed_preprocessed(torch.stack(crops[first : first + 100])) for first in range(0, len(crops), 100)]
    return mean_of(np.concatenate(rows), len(recipe.scales))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.shape}-{len(r.scales)}")
@pytest.mark.parametrize("resize_mode", ["squash", "shortest"])
def test_five_hundred_boxes(
    tmp_path: Path, save_clip: Callable[..., str], picture: Path, recipe: CropRecipe, resize_mode: str
) -> None:
    name, boxes = save_clip(tmp_path / "clip", preprocess={"resize_mode": resize_mode}), _boxes()
    wanted = _reference(load_clip(name, None, device="cpu"), picture, recipe, boxes)
    for precision, least in ((Precision.FP32, 0.9999), (Precision.BF16, 0.999)):
        found = _ours(load_clip(name, None, device="cpu", precision=precision), picture, recipe, boxes)
        assert (found * wanted).sum(axis=1).min() >= least
    assert (found * np.roll(wanted, 1, axis=0)).sum(axis=1).mean() < 0.99  # crops can be told apart


def test_an_embedding_does_not_depend_on_its_batch(clip: str, picture: Path) -> None:
    """Of other crops and of another size; in fp32 to 1e-6. Worker processes change nothing at all."""
    teacher, boxes = load_clip(clip, None, device="cpu"), _boxes()[::4]
    together = _ours(teacher, picture, CropRecipe(), boxes)
    order = np.random.default_rng(1).permutation(len(boxes))
    np.testing.assert_allclose(_ours(teacher, picture, CropRecipe(), boxes[order]), together[order], atol=1e-6, rtol=0)
    np.testing.assert_allclose(_ours(teacher, picture, CropRecipe(), boxes, batch=5), together, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(_ours(teacher, picture, CropRecipe(), boxes, workers=1), together)
