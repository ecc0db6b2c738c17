"""Resizing on bytes against open_clip's own transform on the same pictures: every mode, and shapes that are hard to
round.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from hdovd.pipelines.teachers.preprocessing import Preprocessing

SIZES = [(1, 1), (2, 100), (160, 9), (480, 640), (37, 91), (56, 56), (500, 31), (57, 56), (55, 160)]


def _picture(height: int, width: int) -> np.ndarray:
    """Smooth where it is large, noise where it is small."""
    noise = np.random.default_rng(height).integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [56, (56, 56), (32, 48), (48, 32)], ids=str)
def test_pictures_are_open_clips(size: Any, resize_mode: str, interpolation: str) -> None:
    """To 3 of 255 where it is most, and in few places: Pillow and torch round their weights differently."""
    config = PreprocessCfg(
        size=size,
        resize_mode=resize_mode,
        interpolation=interpolation,
        fill_color=7,
        mean=(0.1, 0.5, 0.4),
        std=(0.2, 0.3, 0.25),
    )
    reference, ours = image_transform_v2(config, is_train=False), Preprocessing.of(asdict(config))
    for height, width in SIZES:
        pixels = _picture(height, width)
        wanted = reference(Image.fromarray(pixels))
        fitted = ours.fit(torch.from_numpy(pixels).permute(2, 0, 1))
        assert fitted.dtype == torch.uint8
        found = ours.normalise(fitted[None])[0]
        assert found.shape == wanted.shape
        steps = (found - wanted).abs() * 255 * torch.tensor(ours.std).view(3, 1, 1)
        assert steps.max() <= 3.01, (height, width)
        assert steps.mean() < 0.05, (height, width)


def test_thin_pictures_that_open_clip_cannot_resize_have_a_pixel() -> None:
    """Keeping the ratio would leave no row of a 1 x 500 picture."""
    ours = Preprocessing((56, 56), (0.5,) * 3, (0.5,) * 3, resize_mode="longest", fill_color=7)
    found = ours.fit(torch.full((3, 1, 500), 200, dtype=torch.uint8))
    assert found.shape == (3, 56, 56)
    assert (found == 200).sum() == 3 * 56
    assert (found == 7).sum() == 3 * 55 * 56
