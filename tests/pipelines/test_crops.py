"""The crop recipe: whole pixels that a box touches, at least one, never outside the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdovd.pipelines.crops import pixel_box, read_image


@pytest.mark.parametrize(("box", "expected"), [
    ([10, 20, 30, 40], (10, 20, 30, 40)),
    ([10.2, 20.9, 29.1, 39.01], (10, 20, 30, 40)),
    ([10.2, 20.9, 10.3, 20.95], (10, 20, 11, 21)),  # inside one pixel
    ([0, 0, 64, 48], (0, 0, 64, 48)),
    ([63.5, 47.5, 64, 48], (63, 47, 64, 48)),
    ([64 - 1e-6, 10, 64, 12], (63, 10, 64, 12)),  # 64 in float32
    ([5, 48 - 1e-6, 6, 48], (5, 47, 6, 48)),
])
def test_pixel_box(box: list[float], expected: tuple[int, ...]) -> None:
    assert pixel_box(np.array(box, np.float32), 64, 48) == expected


def test_any_box_gives_pixels_that_hold_it() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        x, y = np.sort(rng.uniform(0, 64, 2)), np.sort(rng.uniform(0, 48, 2))
        box = np.array([x[0], y[0], x[1], y[1]], np.float32)
        x0, y0, x1, y1 = pixel_box(box, 64, 48)
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 48
        assert x0 <= box[0] < x0 + 1
        assert x1 - 1 <= box[2] <= x1
        assert y0 <= box[1] < y0 + 1
        assert y1 - 1 <= box[3] <= y1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_picture_of_any_kind_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (20, 10)).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    assert read_image(next(tmp_path.iterdir()), 20, 10).mode == "RGB"


def test_size_that_disagrees_names_both(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="20x10.*10x20"):
        read_image(tmp_path / "a.png", 10, 20)
