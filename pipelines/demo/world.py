"""The demo world: a small COCO 2017 folder of pictures that we draw ourselves.

It holds what real OV-COCO holds: base and novel objects together in the training pictures and in the raw annotation
files, captions that name some of them and sometimes what is not there, cluttered backgrounds, occlusion.

Objects are line drawings on a 100 x 100 canvas. Every class is a list of strokes; its look varies by jittered corner
points, rotation, aspect, mirror, two colours and two textures, none of which depends on the class. Tones: A and B are
the object's two colours, O is a hole.
"""

import colorsys
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hdovd.pipelines.common.atomic_write import write_picture, write_text

A, B, O = 255, 128, 0  # noqa: E741
_DRAWN_PX = 192  # pixels a side at which a shape is drawn before it is scaled down


Stroke = tuple[
    str, int, tuple[tuple[float, float], ...], float
]  # kind, tone, canvas units (two corners of an ellipse), width of a line


def _poly(tone: int, *xy: float) -> Stroke:
    return "poly", tone, tuple(zip(xy[::2], xy[1::2], strict=True)), 0.0


def _oval(tone: int, x0: float, y0: float, x1: float, y1: float) -> Stroke:
    return "ellipse", tone, ((x0, y0), (x1, y1)), 0.0


def _box(tone: int, x0: float, y0: float, x1: float, y1: float) -> Stroke:
    return _poly(tone, x0, y0, x1, y0, x1, y1, x0, y1)


def _line(tone: int, width: float, *xy: float) -> Stroke:
    return "line", tone, tuple(zip(xy[::2], xy[1::2], strict=True)), width


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
    tones = _draw(SHAPES[name], rng).rotate(float(rng.uniform(-28, 28)), Image.Resampling.NEAREST, expand=True)
    if rng.random() < 0.5:
        tones = tones.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tones = tones.crop(tones.getbbox())
    width, height = tones.width * float(rng.uniform(0.8, 1.25)), float(tones.height)
    scale = size_px / max(width, height)
    size = (max(6, round(width * scale)), max(6, round(height * scale)))
    first, outline = (
        Image.fromarray(np.where(part, 255, 0).astype(np.uint8)).resize(size, Image.Resampling.BOX)
        for part in (np.asarray(tones) == A, np.asarray(tones) > 0)
    )
    one, two = _colours(rng)
    picture = Image.composite(_fill(size, one, rng), _fill(size, two, rng), first)
    picture.putalpha(outline)
    return picture


def _draw(strokes: list[Stroke], rng: np.random.Generator) -> Image.Image:
    """The shape as a tone map (values A, B, O), every corner moved a little."""
    unit = _DRAWN_PX / (100 + 12)  # a margin of 6 all around
    image = Image.new("L", (_DRAWN_PX, _DRAWN_PX), O)
    pen = ImageDraw.Draw(image)
    for kind, tone, points, width in strokes:
        moved = [
            ((x + 6 + dx) * unit, (y + 6 + dy) * unit)
            for (x, y), (dx, dy) in zip(points, rng.uniform(-2.2, 2.2, (len(points), 2)), strict=True)
        ]
        if kind == "ellipse":
            (x0, y0), (x1, y1) = moved
            pen.ellipse((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=tone)
        elif kind == "poly":
            pen.polygon(moved, fill=tone)
        else:
            pen.line(moved, fill=tone, width=max(2, round(width * unit)), joint="curve")
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


NOVEL = ("butterfly", "fish", "heart", "hourglass", "key", "mushroom", "star", "umbrella")
BASE = tuple(name for name in SHAPES if name not in NOVEL)
GROUNDS = ("grass", "sand", "water", "bricks", "night", "snow")
# Words that a vocabulary also holds although no picture shows them.
ABSENT = ("bicycle", "guitar", "spoon", "violin", "tractor", "pillow", "camera", "ladle", "saddle", "zeppelin")


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture. `boxes` (n, 4) float, xyxy pixels of what is drawn; `names` its n class names."""

    image: Image.Image
    boxes: np.ndarray
    names: tuple[str, ...]
    ground: str
    caption: str


def make_world(
    root: Path,
    *,
    train_images: int,
    val_images: int,
    seed: int,
    workers: int = 2,
    draw: Callable[[int, int], Scene] | None = None,
    name: str = "demo-world",
) -> None:
    """Write train2017/, val2017/, annotations/, protocol.toml and vocabulary.txt under `root`; scenes are drawn by
    `draw_scene` unless told otherwise.

    The same arguments give the same bytes, whatever `workers` is.
    """
    for split, count, offset in (("train2017", train_images, 0), ("val2017", val_images, 500_000)):
        pictures = scenes(count, seed, offset, workers, draw)
        images = write_instances(root, split, pictures, sorted(SHAPES), offset + 1)
        captions = [
            {"id": image["id"], "image_id": image["id"], "caption": scene.caption}
            for image, scene in zip(images, pictures, strict=True)
        ]
        write_text(
            root / "annotations" / f"captions_{split}.json", json.dumps({"images": images, "annotations": captions})
        )
    write_text(root / "vocabulary.txt", "\n".join(sorted((*SHAPES, *GROUNDS, *ABSENT))) + "\n")
    write_text(
        root / "protocol.toml",
        "# The base/novel split of the demo world; every hdovd command takes it with --protocol.\n"
        f'name = "{name}"\nbase = {json.dumps(BASE)}\nnovel = {json.dumps(NOVEL)}\n',
    )


def scenes(
    count: int, seed: int, offset: int, workers: int = 2, draw: Callable[[int, int], Scene] | None = None
) -> list[Scene]:
    """Draw `count` scenes, by `draw_scene` unless told otherwise; scene i depends on (seed, offset + i) alone."""
    draw, indices = draw or draw_scene, range(offset, offset + count)
    if workers <= 1:
        return [draw(seed, i) for i in indices]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(draw, seed), indices, chunksize=32))


def any_class(ground: str, rng: np.random.Generator) -> str:
    return str(rng.choice(list(SHAPES)))


def draw_scene(seed: int, index: int, pick: Callable[[str, np.random.Generator], str] = any_class) -> Scene:
    """Draw one picture with 2 to 6 objects, the class of each by `pick`, of the picture's ground."""
    rng = np.random.default_rng((seed, index))
    width, height = (int(v) for v in rng.permutation((int(rng.integers(136, 177)), int(rng.integers(120, 145)))))
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    image = paint_ground(ground, (width, height), rng)
    boxes, names, wanted = list[tuple[float, ...]](), list[str](), int(rng.integers(2, 7))
    for _ in range(40):
        if len(boxes) == wanted:
            break
        name = pick(ground, rng)
        picture = paint_object(name, int(rng.uniform(30, 68)), rng)
        x = int(rng.integers(-picture.width // 8, width - picture.width * 7 // 8))
        y = int(rng.integers(-picture.height // 8, height - picture.height * 7 // 8))
        box = (max(x, 0), max(y, 0), min(x + picture.width, width), min(y + picture.height, height))
        if any(_covered(box, other) > 0.25 or _covered(other, box) > 0.25 for other in boxes):
            continue
        image.paste(picture, (x, y), picture)
        boxes.append(tuple(map(float, box)))
        names.append(name)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(0.6))
    return Scene(image, np.array(boxes, np.float32).reshape(-1, 4), tuple(names), ground, _caption(names, ground, rng))


def paint_ground(kind: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A cluttered background of one kind; `size` is (width, height)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    noise = rng.normal(0, 1, (height, width)).astype(np.float32)
    soft = (
        np.asarray(
            Image.fromarray(rng.integers(0, 255, (height // 16 + 2, width // 16 + 2), np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            ),
            np.float32,
        )
        / 255
        - 0.5
    )
    value = {
        "grass": lambda: 0.55 + 0.12 * np.sin(x * 1.1 + 4 * soft) * np.abs(noise) + 0.3 * soft,
        "sand": lambda: 0.75 + 0.05 * noise + 0.25 * soft,
        "water": lambda: 0.6 + 0.16 * np.sin(y * 0.5 + 6 * soft) + 0.04 * noise,
        "bricks": lambda: (
            np.where((y % 14 < 2) | ((x + 12 * (y // 14 % 2)) % 24 < 2), 0.8, 0.5) + 0.05 * noise + 0.2 * soft
        ),
        "night": lambda: 0.2 + 0.2 * soft + np.where(noise > 2.9, 0.7, 0.0),
        "snow": lambda: 0.88 + 0.2 * soft + 0.03 * noise,
    }[kind]()
    tint = {
        "grass": (0.45, 0.95, 0.35),
        "sand": (1.0, 0.85, 0.55),
        "water": (0.35, 0.65, 1.0),
        "bricks": (0.9, 0.5, 0.4),
        "night": (0.6, 0.6, 1.0),
        "snow": (0.95, 1.0, 1.0),
    }[kind]
    tinted = value[..., None] * np.clip(np.array(tint) + rng.uniform(-0.15, 0.15, 3), 0, 1)
    ground = Image.fromarray(np.clip(tinted * 255, 0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(3, 9))):  # clutter: soft-edged bars and blobs without an object's structure
        _paint_clutter(ground, rng)
    return ground


def _paint_clutter(ground: Image.Image, rng: np.random.Generator) -> None:
    colour = tuple(int(c) for c in rng.integers(20, 235, 3))
    x, y = rng.uniform(0, ground.width), rng.uniform(0, ground.height)
    pen = ImageDraw.Draw(ground)
    if rng.random() < 0.6:
        angle, length = rng.uniform(0, np.pi), rng.uniform(20, 110)
        dx, dy = np.cos(angle) * length, np.sin(angle) * length
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=int(rng.integers(1, 4)))
    else:
        w, h = rng.uniform(3, 12, 2)
        pen.ellipse((x - w, y - h, x + w, y + h), fill=colour)


def _covered(inner: tuple[float, ...], outer: tuple[float, ...]) -> float:
    """Share of `inner` that `outer` covers."""
    w = min(inner[2], outer[2]) - max(inner[0], outer[0])
    h = min(inner[3], outer[3]) - max(inner[1], outer[1])
    return max(w, 0) * max(h, 0) / max((inner[2] - inner[0]) * (inner[3] - inner[1]), 1e-6)


def _caption(names: list[str], ground: str, rng: np.random.Generator) -> str:
    """A sentence as a person writes it: most objects, now and then one that is not there."""
    told = [n for n in dict.fromkeys(names) if rng.random() < 0.8]
    if rng.random() < 0.2:
        told.append(str(rng.choice([*SHAPES, *ABSENT])))
    subject = " and ".join(f"{'an' if n[0] in 'aeiou' else 'a'} {n}" for n in told) or "some things"
    return f"{subject.capitalize()} in front of {ground}."


def write_instances(
    root: Path, split: str, pictures: Iterable[Scene], names: list[str], first_id: int
) -> list[dict[str, Any]]:
    """Write the pictures, and their objects as COCO has them, categories being `names` from 1 on. Returns the file's
    images.
    """
    category_id = {name: k for k, name in enumerate(names, start=1)}
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id, scene in enumerate(pictures, start=first_id):
        width, height, file_name = scene.image.width, scene.image.height, f"{image_id:012d}.jpg"
        write_picture(root / split / file_name, scene.image, "JPEG", quality=92)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        annotations += [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id[name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for number, ((x0, y0, x1, y1), name) in enumerate(
                zip(scene.boxes.tolist(), scene.names, strict=True), start=len(annotations) + 1
            )
        ]
    instances = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for name, k in category_id.items()],
    }
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(instances))
    return images
