"""The dense instance teacher against crops, on the same labelled boxes in the same run: rate, cosine, zero-shot accuracy.

For `hdovd bench`. Needs a CLIP and a COCO-style folder, no cache. Boxes of all classes are read, novel ones too, as evaluation reads them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths, Exif, ImageBoxes, Split
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.build import embedders_of
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, DenseRecipe
from hdovd.pipelines.embedding.crops import Cutter, Picture, read_picture
from hdovd.pipelines.embedding.embedders import Embedder, Pictures
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

NO_PICTURES = Pictures([], lambda _: Path(), np.zeros(1, np.int64), np.zeros((0, 4), np.float32))


@dataclass(frozen=True, slots=True)
class DenseBenchConfig:
    """What to compare. `clip`, `pretrained`, `activation`: as in `clip_teacher.load_clip`. `sides`: of the dense input, in pixels; None for
    the default of extraction.

    `images`: so many of val2017, spread over the list; their pictures stay in memory. `boxes`: so many a picture at least, for a dense pass
    costs a picture first of all: shifted copies of the labelled ones are added, which count for the rates alone. `batch_size` in crops.
    `rounds`: every way is timed once in each; medians count.
    """

    data: DataPaths
    clip: str
    sides: tuple[int | None, ...]
    pretrained: str | None = None
    protocol: str = "ov-coco"
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    precision: Precision = Precision.AUTO
    activation: Activation = Activation.AUTO
    device: str = "auto"
    images: int = 200
    boxes: int = 30
    batch_size: int = 256
    rounds: int = 3

    def __post_init__(self) -> None:
        if not self.sides or min(self.images, self.batch_size, self.rounds) < 1:
            raise HdovdError("the bench of the dense teacher needs a side, and one image, crop and round at least")


@dataclass(frozen=True, slots=True)
class WayFigures:
    """One way to embed the boxes. `per_s`: boxes a second from decoded pictures to embeddings; `model_per_s`: without preparing CLIP's
    input. `accuracy`: boxes whose class is the most similar of all. Cosines: to the crop of the same box; 1 for crops."""

    name: str
    per_s: float
    model_per_s: float
    accuracy: float
    cosine_mean: float
    cosine_min: float


@dataclass(frozen=True, slots=True)
class DenseFigures:
    """`boxes`: all that were embedded; `labelled` of them count for accuracy and cosines. `ways`: crops first, then a dense one a side."""

    images: int
    boxes: int
    labelled: int
    classes: int
    embedders: list[WayFigures]

    def lines(self) -> list[str]:
        head = f"{'':12s}{'boxes/s':>10s}{'of crops':>10s}{'model alone':>13s}{'accuracy':>10s}{'cosine mean':>13s}{'min':>8s}"
        rows = [f"{way.name:12s}{way.per_s:10,.1f}{way.per_s / self.embedders[0].per_s:10.2f}{way.model_per_s:13,.1f}{way.accuracy:10.3f}"
                f"{way.cosine_mean:13.3f}{way.cosine_min:8.3f}" for way in self.embedders]
        return [f"{self.boxes:,d} boxes of {self.images:,d} images; accuracy among {self.classes} classes and cosines to crops of the "
                f"{self.labelled:,d} that are labelled", head, *rows]


def bench_dense(bench: DenseBenchConfig, log: Callable[[str], None] = print) -> DenseFigures:
    """Embed the same boxes as crops and densely at every side, and compare. Raises HdovdError for bad input."""
    protocol = load_protocol(bench.protocol)
    teacher = load_clip(bench.clip, bench.pretrained, device=bench.device, precision=bench.precision, activation=bench.activation)
    sides = [_dense(teacher, NO_PICTURES, side).input_size[0] for side in bench.sides]  # refused before pictures are read
    split, images = _chosen(bench, protocol, log)
    memory = {split.path(image): read_picture(split.path(image), image.width, image.height, split.exif) for image in images}
    boxes, is_labelled = _filled_up(images, bench.boxes)
    labels = torch.from_numpy(np.concatenate([image.labels for image in images]))
    pictures = Pictures(images, split.path, np.cumsum([0, *map(len, boxes)]), np.concatenate(boxes))
    names = torch.from_numpy(teacher.embed_names(protocol.names, bench.templates))
    embedders = {"crops": embedders_of(teacher, pictures, PLAIN_BOX)[Level.INSTANCE]}
    embedders |= {f"dense {side}": _dense(teacher, pictures, side) for side in sides}
    rates: list[list[tuple[float, float]]] = [[] for _ in embedders]
    rows: list[Tensor] = []
    for number in range(bench.rounds):  # all in turn, again and again: other work on the machine slows whichever is running
        for embedder, of_way in zip(embedders.values(), rates, strict=True):
            embeddings, preparing, embedding = _run(embedder, bench.batch_size, lambda path, *_: memory[path])
            of_way.append((len(embeddings) / (preparing + embedding), len(embeddings) / embedding))
            if number == 0:
                rows.append(embeddings[is_labelled])
    figures = [_figures(name, of_way, embeddings, rows[0], names, labels)
               for name, of_way, embeddings in zip(embedders, rates, rows, strict=True)]
    report = DenseFigures(len(images), len(is_labelled), len(labels), len(protocol.names), figures)
    for line in report.lines():
        log(line)
    return report


def _dense(teacher: ClipTeacher, pictures: Pictures, side: int | None) -> Embedder:
    return embedders_of(teacher, pictures, DenseRecipe(side))[Level.INSTANCE]


def _run(embedder: Embedder, batch_size: int, picture: Callable[[Path, int, int, Exif], Picture]) -> tuple[Tensor, float, float]:
    """Embeddings (n, D) of all boxes, and seconds: of preparing CLIP's input from pictures in memory, and of CLIP."""
    cutter, embeddings, preparing, embedding = Cutter(embedder.fit, embedder.input_size, picture), list[np.ndarray](), 0.0, 0.0
    for rows in embedder.groups(np.arange(len(embedder.pictures.box)), batch_size):
        since = time.perf_counter()
        batch = cutter.batch(embedder.jobs(rows), embedder.places(batch_size))
        ready = time.perf_counter()
        embeddings.append(embedder.encode(batch)[: len(rows)])
        preparing, embedding = preparing + ready - since, embedding + time.perf_counter() - ready
    return torch.from_numpy(np.concatenate(embeddings)), preparing, embedding


def _figures(name: str, rates: list[tuple[float, float]], embeddings: Tensor, crops: Tensor, names: Tensor, labels: Tensor) -> WayFigures:
    """From rates (all, CLIP alone) a round, embeddings of labelled boxes (n, D) this way and as crops, names (K, D), labels (n,)."""
    together, alone = (statistics.median(of_rounds) for of_rounds in zip(*rates, strict=True))
    cosine = (embeddings * crops).sum(dim=1)
    right = (embeddings @ names.T).argmax(dim=1) == labels
    return WayFigures(name, together, alone, float(right.float().mean()), float(cosine.mean()), float(cosine.min()))


def _chosen(bench: DenseBenchConfig, protocol: Protocol, log: Callable[[str], None]) -> tuple[Split, list[ImageBoxes]]:
    """Images with labelled boxes, spread over the list."""
    split = bench.data.load("val2017", protocol, base_only=False, log=log)
    count = min(bench.images, len(split.images))
    return split, [split.images[int(number)] for number in np.linspace(0, len(split.images) - 1, count)]


def _filled_up(images: Sequence[ImageBoxes], count: int) -> tuple[list[np.ndarray], Tensor]:
    """Boxes of every image, `count` at least, its labelled ones first, and which of all boxes are labelled (sum n_i,)."""
    rng, boxes, is_labelled = np.random.default_rng(0), [], []
    for image in images:
        some = image.boxes
        added = some[np.arange(max(0, count - len(some))) % len(some)]
        shift = np.tile(rng.uniform(-0.2, 0.2, (len(added), 2)) * (added[:, 2:] - added[:, :2]), 2)
        limit = np.array([image.width, image.height] * 2)
        boxes.append(np.concatenate([some, np.clip(added + shift, 0, limit).astype(np.float32)]))
        is_labelled += [True] * len(some) + [False] * len(added)
    return boxes, torch.tensor(is_labelled)
