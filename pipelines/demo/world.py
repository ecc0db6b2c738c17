"""The demo world: a small COCO 2017 folder of pictures that we draw ourselves.

It holds what real OV-COCO holds:
base and novel objects together in the training pictures and in the raw annotation files, captions
that name some of them and sometimes what is not there, cluttered backgrounds, occlusion.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.demo.shapes import SHAPES, paint_object

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


def make_world(root: Path, *, train_images: int, val_images: int, seed: int, workers: int = 2) -> None:
    """Write train2017/, val2017/, annotations/, protocol.toml and vocabulary.txt under `root`.

    The same arguments give the same bytes, whatever `workers` is.
    """
    for split, count, offset in (("train2017", train_images, 0), ("val2017", val_images, 500_000)):
        _write_split(root, split, count, seed, offset, workers)
    write_text(root / "vocabulary.txt", "\n".join(sorted((*SHAPES, *GROUNDS, *ABSENT))) + "\n")
    quoted = {"base": BASE, "novel": NOVEL}
    lines = [
        "# The base/novel split of the demo world; every hdovd command takes it with --protocol.",
        'name = "demo-world"',
    ]
    lines += [f"{key} = {json.dumps(names)}" for key, names in quoted.items()]
    write_text(root / "protocol.toml", "\n".join(lines) + "\n")


def scenes(count: int, seed: int, offset: int, workers: int = 2) -> list[Scene]:
    """Draw `count` scenes; scene i depends on (seed, offset + i) alone."""
    indices = range(offset, offset + count)
    if workers <= 1:
        return [draw_scene(seed, i) for i in indices]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(draw_scene, seed), indices, chunksize=32))


def draw_scene(seed: int, index: int) -> Scene:
    """Draw one picture with 2 to 6 objects."""
    rng = np.random.default_rng((seed, index))
    width, height = (int(v) for v in rng.permutation((int(rng.integers(136, 177)), int(rng.integers(120, 145)))))
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    image = paint_ground(ground, (width, height), rng)
    boxes: list[tuple[float, ...]] = []
    names: list[str] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(40):
        if len(boxes) == wanted:
            break
        name = str(rng.choice(list(SHAPES)))
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
    rows = (y // 14).astype(int)
    value = {
        "grass": lambda: 0.55 + 0.12 * np.sin(x * 1.1 + 4 * soft) * np.abs(noise) + 0.3 * soft,
        "sand": lambda: 0.75 + 0.05 * noise + 0.25 * soft,
        "water": lambda: 0.6 + 0.16 * np.sin(y * 0.5 + 6 * soft) + 0.04 * noise,
        "bricks": lambda: (
            np.where((y % 14 < 2) | ((x + 12 * (rows % 2)) % 24 < 2), 0.8, 0.5) + 0.05 * noise + 0.2 * soft
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
    tint_jitter = np.clip(np.array(tint) + rng.uniform(-0.15, 0.15, 3), 0, 1)
    ground = Image.fromarray(np.clip(value[..., None] * tint_jitter * 255, 0, 255).astype(np.uint8))
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


def _write_split(root: Path, split: str, count: int, seed: int, offset: int, workers: int) -> None:
    category_id = {name: k for k, name in enumerate(sorted(SHAPES), start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for i, scene in enumerate(scenes(count, seed, offset, workers)):
        image_id = offset + i + 1
        file_name = f"{image_id:012d}.jpg"
        write_picture(root / split / file_name, scene.image, "JPEG", quality=92)
        images.append(
            {"id": image_id, "file_name": file_name, "width": scene.image.width, "height": scene.image.height}
        )
        captions.append({"id": image_id, "image_id": image_id, "caption": scene.caption})
        for (x0, y0, x1, y1), name in zip(scene.boxes.tolist(), scene.names, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id[name],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k, "name": name} for name, k in category_id.items()]
    folder = root / "annotations"
    write_text(
        folder / f"instances_{split}.json",
        json.dumps({"images": images, "annotations": annotations, "categories": categories}),
    )
    write_text(folder / f"captions_{split}.json", json.dumps({"images": images, "annotations": captions}))
