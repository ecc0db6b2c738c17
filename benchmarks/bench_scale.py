"""Extraction at full scale with a cheap model in place of CLIP: rows a second, and peak host memory.

    python benchmarks/run.py bench_scale [--workers 2]

Everything but the model is the real thing: annotation and proposal files of the size of COCO's, pictures that are
opened, cut and resized, shards that are written and checked. The defaults make 4 million rows, 5 GB on disk.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parsed, workplace
from torch import Tensor

from hdovd.cache import Catalog, Level
from hdovd.cache.identity import hash_texts
from hdovd.data import DataPaths
from hdovd.pipelines.common.console import size
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.forecast import make_world
from hdovd.pipelines.teachers.base import Name, prompts

PICTURES = 16  # files: the images of the world are these, over and over
BASE_BOXES = 4  # annotations an image
NOUNS = 100


@dataclass(frozen=True)
class ScaleBench:
    """`boxes`: proposals an image, beside its BASE_BOXES. `side`: of the model's input, in pixels."""

    images: int = 118_287
    boxes: int = 30
    dim: int = 512
    side: int = 8
    workers: int = 0


@dataclass(frozen=True)
class Figures:
    """`rows`: of pictures and crops. `seconds`: of the whole extraction, its input files read. Peaks: the largest
    resident set of the main process, and of one worker; what they share is counted in both.
    """

    rows: int
    seconds: float
    main_peak: int
    worker_peak: int
    workers: int
    cache_bytes: int

    def lines(self) -> list[str]:
        parts = (
            f" (main {size(self.main_peak)}, {self.workers} workers of {size(self.worker_peak)})"
            if self.workers
            else ""
        )
        return [
            f"{self.rows:,d} rows in {self.seconds:.0f} s, {self.rows / self.seconds:,.0f} rows/s",
            f"peak host memory {size(self.main_peak + self.workers * self.worker_peak)}{parts}",
            f"cache {size(self.cache_bytes)}",
        ]


class StubTeacher:
    """Answers with a fixed random projection of the pixels, or of a name's letters: deterministic, and nearly free."""

    def __init__(self, dim: int, side: int) -> None:
        self.dim, self.device, self.input_size = dim, torch.device("cpu"), (side, side)
        self.fit = Shrink(side)
        self.identity: dict[str, Any] = {"model": "stub", "dim": dim}
        self.preprocessing: dict[str, Any] = {"side": side}
        self.notes: Sequence[str] = ()
        self.made_with: dict[str, Any] = {}
        self._projection = torch.randn(3 * side * side + 1, dim, generator=torch.Generator().manual_seed(0))

    def embed_images(self, pixels: Tensor) -> np.ndarray:
        flat = pixels.flatten(1) / 255
        return self._project(
            torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
        )  # the one: a black picture has a direction too

    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        letters = torch.zeros(len(names), len(self._projection))
        for row, text in prompts(names, ("{}",)):
            for place, letter in enumerate(text.encode()):
                letters[row, place % letters.shape[1]] += letter
        return self._project(letters)

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        return hash_texts(text for _, text in prompts(names, templates))

    def prompt_notes(self, names: Sequence[Name], templates: Sequence[str]) -> list[str]:
        return []

    def best_batch(self) -> int:
        return 256

    def peak_memory_bytes(self) -> int | None:
        return None

    def _project(self, values: Tensor) -> np.ndarray:
        return torch.nn.functional.normalize(values @ self._projection, dim=1).numpy()


@dataclass(frozen=True)
class Shrink:
    """The nearest pixels: (3, h, w) uint8 -> (3, side, side)."""

    side: int

    def __call__(self, picture: Tensor) -> Tensor:
        rows, columns = ((2 * torch.arange(self.side) + 1) * length // (2 * self.side) for length in picture.shape[1:])
        return picture[:, rows][:, :, columns]


def bench_scale(folder: Path, bench: ScaleBench) -> Figures:
    """Make a world of that size in `folder`, extract it, and measure."""
    print(
        f"making {bench.images:,d} images with {BASE_BOXES} boxes and {bench.boxes} proposals each, from {PICTURES} "
        f"pictures"
    )
    make_world(
        folder,
        bench.images,
        base_boxes=BASE_BOXES,
        proposals=bench.boxes,
        size=(64, 48),
        pictures=PICTURES,
        file_type="png",
    )
    (folder / "nouns.txt").write_text("\n".join(f"noun {number}" for number in range(NOUNS)))
    config = ExtractConfig(
        data=DataPaths(images=folder / "images", annotations=folder / "annotations.json"),
        cache=folder / "cache",
        clip="stub",
        proposals=folder / "proposals.json",
        vocabulary=folder / "nouns.txt",
        workers=bench.workers,
    )
    started = time.monotonic()
    report = extract_clip(config, StubTeacher(bench.dim, bench.side))
    seconds = time.monotonic() - started
    main, worker = (
        1024 * resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return Figures(
        report.new_rows[Level.IMAGE] + report.new_rows[Level.INSTANCE],
        seconds,
        main,
        worker,
        bench.workers,
        sum(product.bytes() for product in Catalog(folder / "cache").products()),
    )


if __name__ == "__main__":
    with workplace() as place:
        print(*bench_scale(place, parsed(ScaleBench, __doc__)).lines(), sep="\n")
