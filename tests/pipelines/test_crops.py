"""The crop recipe: whole pixels that a box touches, at least one, never outside the picture."""

from __future__ import annotations

import numpy as np
import pytest

from hdovd.pipelines.crops import pixel_box


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
