"""Extraction at full scale with a cheap model in place of CLIP: does its own work stay within memory, and how fast is it?

Called by `hdovd bench extract`. Everything but the model is the real thing: annotation and proposal files of the size of
COCO's, pictures that are opened, cut and resized, shards that are written and checked.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdovd.cache.catalog import Catalog
from hdovd.cache.identity import hash_texts
from hdovd.cache.schema import Level
from hdovd.coco import DataPaths
from hdovd.pipelines.extract_clip import extract_clip, size
from hdovd.pipelines.extract_config import ExtractConfig
from hdovd.pipelines.prompt_templates import Name, prompts
from hdovd.protocol import load_protocol

PICTURES = 16  # the images of the world are these, over and over
WIDTH, HEIGHT = 64, 48
BASE_BOXES = 4  # annotations an image
NOUNS = 100


@dataclass(frozen=True, slots=True)
class ExtractBench:
    """`boxes`: proposals an image, beside its BASE_BOXES. `side`: of the model's input, in pixels. `folder`: an empty one to work in."""

    folder: Path
    images: int = 118_287
    boxes: int = 30
    dim: int = 512
    side: int = 8
    workers: int = 0


@dataclass(frozen=True, slots=True)
class ExtractFigures:
    """`rows`: of pictures and crops. `seconds`: of the whole extraction, its input files read. Peaks: the largest resident
    set of the main process, and of one worker; what they share is counted in both."""

    rows: int
    seconds: float
    main_peak_bytes: int
    worker_peak_bytes: int
    cache_bytes: int
    workers: int

    @property
    def peak_bytes(self) -> int:
        """At most what all processes held together."""
        return self.main_peak_bytes + self.workers * self.worker_peak_bytes

    def lines(self) -> list[str]:
        parts = f" (main {size(self.main_peak_bytes)}, {self.workers} workers of {size(self.worker_peak_bytes)})" if self.workers else ""
        return [f"{self.rows:,d} rows in {self.seconds:.0f} s, {self.rows / self.seconds:,.0f} rows/s",
                f"peak host memory {size(self.peak_bytes)}{parts}", f"cache {size(self.cache_bytes)}"]


class StubTeacher:
    """Answers with a fixed random projection of the pixels, or of a name's letters: deterministic, and nearly free."""

    def __init__(self, dim: int, side: int) -> None:
        self.dim, self.side = dim, side
        self.preprocess: Callable[[Image.Image], Tensor] = Shrink(side)
        self.identity: dict[str, Any] = {"model": "stub", "dim": dim}
        self.preprocessing: dict[str, Any] = {"side": side}
        self.notes: Sequence[str] = ()
        self.made_with: dict[str, Any] = {}
        self._projection = torch.randn(3 * side * side + 1, dim, generator=torch.Generator().manual_seed(0))

    def embed_images(self, pixels: Tensor) -> np.ndarray:
        flat = pixels.flatten(1)
        return self._project(torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1))  # the one: a black picture has a direction too

    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        letters = torch.zeros(len(names), len(self._projection))
        for row, text in prompts(names, ("{}",)):
            for place, letter in enumerate(text.encode()):
                letters[row, place % letters.shape[1]] += letter
        return self._project(letters)

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        return hash_texts(text for _, text in prompts(names, templates))

    def peak_memory_bytes(self) -> int | None:
        return None

    def _project(self, values: Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(values @ self._projection, dim=1).numpy()


@dataclass(frozen=True, slots=True)
class Shrink:
    """An RGB picture -> (3, side, side) float32 in 0 to 1."""

    side: int

    def __call__(self, picture: Image.Image) -> Tensor:
        small = picture.resize((self.side, self.side), Image.Resampling.NEAREST)
        return torch.from_numpy((np.asarray(small) * np.float32(1 / 255)).transpose(2, 0, 1))


def bench_extract(config: ExtractBench, log: Callable[[str], None] = print) -> ExtractFigures:
    """Make a world of that size in `config.folder`, extract it, and measure."""
    log(f"making {config.images:,d} images with {BASE_BOXES} boxes and {config.boxes} proposals each, from {PICTURES} pictures")
    _make_world(config)
    folder, started = config.folder, time.monotonic()
    report = extract_clip(
        ExtractConfig(DataPaths(images=folder / "images", annotations=folder / "annotations.json"), folder / "cache", "stub",
                      proposals=folder / "proposals.json", vocabulary=folder / "nouns.txt", workers=config.workers),
        log, StubTeacher(config.dim, config.side))
    seconds = time.monotonic() - started
    cache_bytes = sum(product.bytes() for product in Catalog(folder / "cache").products())
    return ExtractFigures(report.new_rows[Level.IMAGE] + report.new_rows[Level.INSTANCE], seconds, _peak(resource.RUSAGE_SELF),
                          _peak(resource.RUSAGE_CHILDREN), cache_bytes, config.workers)


def _peak(who: int) -> int:
    return 1024 * resource.getrusage(who).ru_maxrss


def _make_world(config: ExtractBench) -> None:
    """Pictures, a COCO instances file, a proposal file and a vocabulary; written item by item, at no memory."""
    (config.folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(config.folder / "images" / f"{number}.png")
    names = load_protocol("ov-coco").names
    with (config.folder / "annotations.json").open("w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": name} for i, name in enumerate(names, 1)]) + ', "images": [')
        file.writelines(_listed(f'{{"id": {i}, "file_name": "{i % PICTURES}.png", "width": {WIDTH}, "height": {HEIGHT}}}'
                                for i in range(config.images)))
        file.write('], "annotations": [')
        file.writelines(_listed(f'{{"id": {n}, "image_id": {image}, "category_id": 1, "iscrowd": 0, "bbox": {box}}}'
                                for n, (image, box, _) in enumerate(_boxes(rng, config.images, BASE_BOXES))))
        file.write("]}")
    with (config.folder / "proposals.json").open("w") as file:
        file.write("[")
        file.writelines(_listed(f'{{"image_id": {image}, "bbox": {box}, "score": {score:.4f}}}'
                                for image, box, score in _boxes(rng, config.images, config.boxes)))
        file.write("]")
    (config.folder / "nouns.txt").write_text("\n".join(f"noun {number}" for number in range(NOUNS)))


def _boxes(rng: np.random.Generator, images: int, count: int) -> Iterator[tuple[int, list[float], float]]:
    """`count` boxes (x, y, w, h) an image with a score, image by image."""
    for image in range(images):
        corners, sides, scores = rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2)), rng.uniform(0, 1, count)
        boxes = np.round(np.concatenate([corners, sides], axis=1) * [WIDTH, HEIGHT, WIDTH, HEIGHT], 2)
        yield from zip([image] * count, boxes.tolist(), scores.tolist(), strict=True)


def _listed(items: Iterator[str]) -> Iterator[str]:
    """The items with commas between them."""
    for number, item in enumerate(items):
        yield item if number == 0 else f",\n{item}"
