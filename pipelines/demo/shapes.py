"""The objects of the demo world: line drawings on a 100 x 100 canvas, and how one is painted.

Every class is a list of strokes; its look varies by jittered corner points,
rotation, aspect, mirror, two colours and two textures, none of which depends on the class.
Tones: A and B are the object's two colours, O is a hole.
"""

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

A, B, O = 255, 128, 0  # noqa: E741
CANVAS = 100  # drawing units a side
_DRAWN_PX = 192  # pixels a side at which a shape is drawn before it is scaled down


@dataclass(frozen=True, slots=True)
class Stroke:
    """One filled outline. `points` are canvas units: corners (poly, line) or two corners (ellipse)."""

    kind: Literal["poly", "ellipse", "line"]
    tone: int
    points: tuple[tuple[float, float], ...]
    width: float = 0.0  # line only


def _poly(tone: int, *xy: float) -> Stroke:
    return Stroke("poly", tone, tuple(zip(xy[::2], xy[1::2], strict=True)))


def _oval(tone: int, x0: float, y0: float, x1: float, y1: float) -> Stroke:
    return Stroke("ellipse", tone, ((x0, y0), (x1, y1)))


def _box(tone: int, x0: float, y0: float, x1: float, y1: float) -> Stroke:
    return _poly(tone, x0, y0, x1, y0, x1, y1, x0, y1)


def _line(tone: int, width: float, *xy: float) -> Stroke:
    return Stroke("line", tone, tuple(zip(xy[::2], xy[1::2], strict=True)), width)


_STAR = [
    c
    for k in range(10)
    for c in (
        50 + (48 if k % 2 == 0 else 20) * np.sin(np.pi * k / 5),
        50 - (48 if k % 2 == 0 else 20) * np.cos(np.pi * k / 5),
    )
]
_PETALS = [
    _oval(A, 50 + 30 * np.cos(t) - 19, 50 + 30 * np.sin(t) - 19, 50 + 30 * np.cos(t) + 19, 50 + 30 * np.sin(t) + 19)
    for t in np.arange(6) * np.pi / 3
]

SHAPES: dict[str, list[Stroke]] = {
    "anchor": [
        _oval(A, 40, 2, 60, 22),
        _oval(O, 46, 8, 54, 16),
        _box(A, 46, 20, 54, 92),
        _box(B, 28, 28, 72, 36),
        _line(A, 10, 10, 60, 18, 80, 50, 92, 82, 80, 90, 60),
        _poly(A, 2, 66, 12, 50, 22, 66),
        _poly(A, 78, 66, 88, 50, 98, 66),
    ],
    "bell": [
        _oval(B, 42, 2, 58, 18),
        _poly(A, 50, 10, 68, 20, 76, 60, 92, 78, 8, 78, 24, 60, 32, 20),
        _oval(B, 38, 76, 62, 98),
    ],
    "boat": [
        _poly(A, 2, 64, 98, 64, 80, 94, 20, 94),
        _box(B, 47, 6, 52, 64),
        _poly(B, 56, 8, 92, 56, 56, 56),
        _poly(A, 43, 16, 43, 56, 14, 56),
    ],
    "bottle": [
        _box(B, 41, 2, 59, 12),
        _box(A, 43, 12, 57, 34),
        _poly(A, 43, 30, 57, 30, 70, 48, 70, 98, 30, 98, 30, 48),
        _box(B, 30, 58, 70, 80),
    ],
    "cactus": [
        _box(A, 40, 4, 60, 76),
        _line(A, 13, 14, 26, 14, 50, 46, 50),
        _line(A, 13, 86, 18, 86, 40, 54, 40),
        _poly(B, 24, 74, 76, 74, 68, 98, 32, 98),
    ],
    "candle": [
        _poly(B, 50, 0, 60, 18, 50, 30, 40, 18),
        _line(B, 3, 50, 26, 50, 38),
        _box(A, 38, 36, 62, 88),
        _poly(B, 16, 84, 84, 84, 74, 98, 26, 98),
    ],
    "car": [
        _poly(A, 2, 48, 20, 44, 34, 22, 70, 22, 84, 44, 98, 50, 98, 74, 2, 74),
        _poly(B, 38, 28, 50, 28, 50, 44, 28, 44),
        _poly(B, 55, 28, 67, 28, 76, 44, 55, 44),
        _oval(B, 12, 60, 38, 86),
        _oval(B, 62, 60, 88, 86),
    ],
    "clock": [
        _oval(A, 4, 4, 96, 96),
        _oval(B, 14, 14, 86, 86),
        _line(A, 7, 50, 52, 50, 22),
        _line(A, 7, 50, 50, 72, 62),
    ],
    "crown": [
        _poly(A, 4, 22, 28, 52, 50, 10, 72, 52, 96, 22, 88, 84, 12, 84),
        _box(B, 12, 70, 88, 84),
        _oval(B, 44, 2, 56, 14),
    ],
    "flower": [*_PETALS, _oval(B, 36, 36, 64, 64)],
    "ghost": [
        _oval(A, 14, 2, 86, 74),
        _poly(A, 14, 38, 86, 38, 86, 98, 68, 82, 50, 98, 32, 82, 14, 98),
        _oval(O, 30, 28, 44, 48),
        _oval(O, 56, 28, 70, 48),
    ],
    "hammer": [_poly(A, 14, 6, 70, 6, 92, 22, 70, 32, 14, 32), _box(B, 40, 32, 56, 98)],
    "house": [
        _poly(B, 50, 2, 98, 46, 2, 46),
        _box(A, 14, 46, 86, 96),
        _box(B, 42, 64, 60, 96),
        _box(O, 22, 56, 36, 70),
        _box(O, 66, 56, 80, 70),
    ],
    "ladder": [
        _line(A, 8, 24, 0, 24, 100),
        _line(A, 8, 76, 0, 76, 100),
        _box(B, 24, 12, 76, 20),
        _box(B, 24, 34, 76, 42),
        _box(B, 24, 56, 76, 64),
        _box(B, 24, 78, 76, 86),
    ],
    "lamp": [_poly(A, 32, 4, 68, 4, 90, 46, 10, 46), _box(B, 46, 46, 54, 88), _oval(B, 22, 82, 78, 98)],
    "tree": [
        _poly(A, 50, 0, 78, 36, 22, 36),
        _poly(A, 50, 20, 88, 62, 12, 62),
        _poly(A, 50, 44, 96, 84, 4, 84),
        _box(B, 42, 84, 58, 100),
    ],
    "butterfly": [
        _oval(A, 2, 8, 48, 54),
        _oval(A, 52, 8, 98, 54),
        _oval(B, 14, 48, 48, 90),
        _oval(B, 52, 48, 86, 90),
        _oval(A, 45, 14, 55, 90),
        _line(A, 3, 50, 18, 36, 2),
        _line(A, 3, 50, 18, 64, 2),
    ],
    "fish": [
        _oval(A, 2, 24, 74, 76),
        _poly(B, 64, 50, 98, 20, 90, 50, 98, 80),
        _poly(B, 30, 28, 50, 6, 56, 30),
        _oval(O, 16, 40, 26, 50),
    ],
    "heart": [_oval(A, 4, 8, 52, 54), _oval(A, 48, 8, 96, 54), _poly(A, 8, 42, 50, 32, 92, 42, 50, 96)],
    "hourglass": [
        _box(B, 12, 2, 88, 12),
        _box(B, 12, 88, 88, 98),
        _poly(A, 20, 12, 80, 12, 54, 50, 80, 88, 20, 88, 46, 50),
    ],
    "key": [
        _oval(A, 2, 30, 42, 70),
        _oval(O, 13, 41, 31, 59),
        _box(A, 40, 45, 98, 55),
        _box(A, 74, 54, 82, 72),
        _box(B, 88, 54, 97, 78),
    ],
    "mushroom": [
        _poly(B, 38, 48, 62, 48, 68, 96, 32, 96),
        _oval(A, 4, 4, 96, 86),
        _poly(O, 0, 54, 38, 54, 38, 100, 0, 100),
        _poly(O, 62, 54, 100, 54, 100, 100, 62, 100),
        _poly(B, 38, 54, 62, 54, 68, 96, 32, 96),
    ],
    "star": [_poly(A, *_STAR)],
    "umbrella": [
        _oval(A, 2, 4, 98, 100),
        _poly(O, 0, 52, 100, 52, 100, 100, 0, 100),
        _line(B, 6, 50, 52, 50, 88, 40, 96, 32, 88),
    ],
}

TEXTURES = ("plain", "stripes", "dots", "checks", "fade", "speckle")


def paint_object(name: str, size_px: int, rng: np.random.Generator) -> Image.Image:
    """Paint one object of class `name`, its longer side `size_px` pixels, cropped to what is visible.

    Returns an RGBA image; alpha is the object's outline.
    """
    tones = _draw(SHAPES[name], rng)
    tones = tones.rotate(float(rng.uniform(-28, 28)), Image.Resampling.NEAREST, expand=True)
    if rng.random() < 0.5:
        tones = tones.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tones = tones.crop(tones.getbbox())
    aspect = float(rng.uniform(0.8, 1.25))
    width, height = tones.width * aspect, float(tones.height)
    scale = size_px / max(width, height)
    size = (max(6, round(width * scale)), max(6, round(height * scale)))
    map_ = np.asarray(tones)
    first = Image.fromarray(np.where(map_ == A, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    outline = Image.fromarray(np.where(map_ > 0, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    one, two = _colours(rng)
    picture = Image.composite(_fill(size, one, rng), _fill(size, two, rng), first)
    picture.putalpha(outline)
    return picture


def _draw(strokes: list[Stroke], rng: np.random.Generator) -> Image.Image:
    """The shape as a tone map (values A, B, O), every corner moved a little."""
    unit = _DRAWN_PX / (CANVAS + 12)
    image = Image.new("L", (_DRAWN_PX, _DRAWN_PX), O)
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        moved = [
            ((x + 6 + dx) * unit, (y + 6 + dy) * unit)
            for (x, y), (dx, dy) in zip(stroke.points, rng.uniform(-2.2, 2.2, (len(stroke.points), 2)), strict=True)
        ]
        if stroke.kind == "ellipse":
            (x0, y0), (x1, y1) = moved
            pen.ellipse((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=stroke.tone)
        elif stroke.kind == "poly":
            pen.polygon(moved, fill=stroke.tone)
        else:
            pen.line(moved, fill=stroke.tone, width=max(2, round(stroke.width * unit)), joint="curve")
    return image


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours that can be told apart, as RGB in 0..255."""
    hue = rng.random()
    one = (hue, rng.uniform(0.4, 1.0), rng.uniform(0.55, 1.0))
    two = ((hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.3, 1.0), rng.uniform(0.15, 0.5))
    if rng.random() < 0.5:
        one, two = two, one
    return tuple(np.array(colorsys.hsv_to_rgb(*c)) * 255 for c in (one, two))  # type: ignore[return-value]


def _fill(size: tuple[int, int], colour: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A textured rectangle of one colour; `size` is (width, height)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = TEXTURES[rng.integers(len(TEXTURES))]
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 12)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    shade = {
        "plain": lambda: np.ones_like(x),
        "stripes": lambda: 0.75 + 0.25 * np.sign(np.sin(2 * np.pi * along / period)),
        "dots": lambda: np.where(
            (along % period - period / 2) ** 2 + (across % period - period / 2) ** 2 < (period / 3.5) ** 2, 0.55, 1.0
        ),
        "checks": lambda: 0.8 + 0.2 * np.sign(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period)),
        "fade": lambda: 0.6 + 0.4 * (along - along.min()) / max(float(np.ptp(along)), 1.0),
        "speckle": lambda: rng.uniform(0.7, 1.0, x.shape),
    }[kind]()
    return Image.fromarray(np.clip(shade[..., None] * colour, 0, 255).astype(np.uint8))
