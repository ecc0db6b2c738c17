"""Made-up pictures and boxes in COCO's forms, of any number, for benchmarks of the extraction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hdovd.data.protocol import load_protocol


@dataclass(frozen=True, slots=True)
class BenchWorld:
    """`images` with `base_boxes` annotations and `proposals` each; they are `pictures` files over and over. Sizes in pixels."""

    images: int
    base_boxes: int
    proposals: int
    pictures: int
    width: int
    height: int
    file_type: str = "png"


def make_world(folder: Path, world: BenchWorld) -> None:
    """`images/`, annotations.json and proposals.json; written item by item, at no memory."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(world.pictures):
        pixels = rng.integers(0, 256, (-(-world.height // 8), -(-world.width // 8), 3), np.uint8)
        Image.fromarray(pixels).resize((world.width, world.height)).save(folder / "images" / f"{number}.{world.file_type}", quality=90)
    names = load_protocol("ov-coco").names
    with (folder / "annotations.json").open("w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": name} for i, name in enumerate(names, 1)]) + ', "images": [')
        file.writelines(_listed(f'{{"id": {i}, "file_name": "{i % world.pictures}.{world.file_type}", "width": {world.width}, '
                                f'"height": {world.height}}}' for i in range(world.images)))
        file.write('], "annotations": [')
        file.writelines(_listed(f'{{"id": {n}, "image_id": {image}, "category_id": 1, "iscrowd": 0, "bbox": {box}}}'
                                for n, (image, box, _) in enumerate(_boxes(rng, world, world.base_boxes))))
        file.write("]}")
    with (folder / "proposals.json").open("w") as file:
        file.write("[")
        file.writelines(_listed(f'{{"image_id": {image}, "bbox": {box}, "score": {score:.4f}}}'
                                for image, box, score in _boxes(rng, world, world.proposals)))
        file.write("]")


def _boxes(rng: np.random.Generator, world: BenchWorld, count: int) -> Iterator[tuple[int, list[float], float]]:
    """`count` boxes (x, y, w, h) an image with a score, image by image."""
    for image in range(world.images):
        corners, sides, scores = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2)), rng.uniform(0, 1, count)
        boxes = np.round(np.concatenate([corners, sides], axis=1) * [world.width, world.height, world.width, world.height], 2)
        yield from zip([image] * count, boxes.tolist(), scores.tolist(), strict=True)


def _listed(items: Iterator[str]) -> Iterator[str]:
    """The items with commas between them."""
    for number, item in enumerate(items):
        yield item if number == 0 else f",\n{item}"
