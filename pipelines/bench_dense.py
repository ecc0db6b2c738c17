"""The dense instance teacher against crops, on the same labelled boxes in the same run: rate, cosine, zero-shot accuracy.

For `hdovd bench`. Needs a CLIP and a COCO-style folder, no cache. Boxes of all classes are read, novel ones too, as evaluation reads them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hdovd.coco import DataPaths
from hdovd.errors import HdovdError
from hdovd.pipelines.clip_teacher import ClipTeacher, load_clip
from hdovd.pipelines.crop_recipe import PLAIN_BOX
from hdovd.pipelines.crops import cut
from hdovd.pipelines.dense_clip import DenseClip, scale_boxes
from hdovd.pipelines.extract_config import DEFAULT_TEMPLATES, Activation, Precision
from hdovd.pipelines.images import read_pixels
from hdovd.protocol import Protocol, load_protocol


@dataclass(frozen=True, slots=True)
class DenseBench:
    """What to compare. `clip`, `pretrained`, `activation`: as in `clip_teacher.load_clip`. `sides`: of the dense input, in pixels.

    `images`: so many of val2017, spread over the list; their pictures stay in memory. `boxes`: so many a picture at least, for a dense pass
    costs a picture first of all: shifted copies of the labelled ones are added, which count for the rates alone. `batch_size` in crops,
    `image_batch` in pictures. `rounds`: every way is timed once in each; medians count.
    """

    data: DataPaths
    clip: str
    sides: tuple[int, ...]
    pretrained: str | None = None
    protocol: str = "ov-coco"
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    precision: Precision = Precision.FP32
    activation: Activation = Activation.AUTO
    device: str = "auto"
    images: int = 200
    boxes: int = 30
    batch_size: int = 256
    image_batch: int = 16
    rounds: int = 3

    def __post_init__(self) -> None:
        if not self.sides or min(self.images, self.batch_size, self.image_batch, self.rounds) < 1:
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
    ways: list[WayFigures]

    def lines(self) -> list[str]:
        head = f"{'':12s}{'boxes/s':>10s}{'of crops':>10s}{'model alone':>13s}{'accuracy':>10s}{'cosine mean':>13s}{'min':>8s}"
        rows = [f"{way.name:12s}{way.per_s:10,.1f}{way.per_s / self.ways[0].per_s:10.2f}{way.model_per_s:13,.1f}{way.accuracy:10.3f}"
                f"{way.cosine_mean:13.3f}{way.cosine_min:8.3f}" for way in self.ways]
        return [f"{self.boxes:,d} boxes of {self.images:,d} images; accuracy among {self.classes} classes and cosines to crops of the "
                f"{self.labelled:,d} that are labelled", head, *rows]


def bench_dense(bench: DenseBench, log: Callable[[str], None] = print) -> DenseFigures:
    """Embed the same boxes as crops and densely at every side, and compare. Raises HdovdError for bad input."""
    protocol = load_protocol(bench.protocol)
    teacher = load_clip(bench.clip, bench.pretrained, device=bench.device, precision=bench.precision, activation=bench.activation)
    dense = [_Dense(teacher, side, bench.image_batch) for side in bench.sides]  # refuses what it cannot do before pictures are read
    pictures, labelled, labels = _labelled(bench, protocol, log)
    boxes, is_labelled = _filled_up(labelled, pictures, bench.boxes)
    names = torch.from_numpy(teacher.embed_names(protocol.names, bench.templates))
    ways: Sequence[_Crops | _Dense] = [_Crops(teacher, bench.batch_size), *dense]
    rates: list[list[tuple[float, float]]] = [[] for _ in ways]
    rows: list[Tensor] = []
    for number in range(bench.rounds):  # all in turn, again and again: other work on the machine slows whichever is running
        for way, of_way in zip(ways, rates, strict=True):
            embeddings, preparing, embedding = _run(way, pictures, boxes)
            of_way.append((len(embeddings) / (preparing + embedding), len(embeddings) / embedding))
            if number == 0:
                rows.append(embeddings[is_labelled])
    figures = [_figures(way.name, of_way, embeddings, rows[0], names, labels)
               for way, of_way, embeddings in zip(ways, rates, rows, strict=True)]
    report = DenseFigures(len(pictures), len(is_labelled), len(labels), len(protocol.names), figures)
    for line in report.lines():
        log(line)
    return report


class _Crops:
    """As extraction embeds them."""

    name = "crops"

    def __init__(self, teacher: ClipTeacher, batch_size: int) -> None:
        self._teacher, self._batch_size = teacher, batch_size

    def batches(self, pictures: Sequence[Tensor], boxes: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        of_box = [(picture, region) for picture, some in zip(pictures, boxes, strict=True)
                  for region in PLAIN_BOX.regions(some, picture.shape[2], picture.shape[1]).tolist()]
        for start in range(0, len(of_box), self._batch_size):
            yield torch.stack([self._teacher.fit(cut(*crop)) for crop in of_box[start : start + self._batch_size]]), []

    def embed(self, pixels: Tensor, _: list[Tensor]) -> Tensor:
        return torch.from_numpy(self._teacher.embed_images(pixels))


class _Dense:
    def __init__(self, teacher: ClipTeacher, side: int, image_batch: int) -> None:
        self.name = f"dense {side}"
        self._clip, self._side, self._image_batch = DenseClip(teacher.model.visual, side), side, image_batch
        self._transform = teacher.transform.squashed(side)
        self._device, self._dtype = teacher.device, getattr(torch, teacher.identity["compute_dtype"])

    def batches(self, pictures: Sequence[Tensor], boxes: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for start in range(0, len(pictures), self._image_batch):
            some = pictures[start : start + self._image_batch]
            scaled = [scale_boxes(torch.from_numpy(of_picture), picture.shape[2], picture.shape[1], self._side)
                      for picture, of_picture in zip(some, boxes[start : start + self._image_batch], strict=True)]
            yield torch.stack([self._transform.fit(picture) for picture in some]), scaled

    def embed(self, pixels: Tensor, boxes: list[Tensor]) -> Tensor:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._clip.embed_boxes(self._transform.normalise(pixels.to(self._device)), boxes).cpu()


def _run(way: _Crops | _Dense, pictures: Sequence[Tensor], boxes: Sequence[np.ndarray]) -> tuple[Tensor, float, float]:
    """Embeddings (n, D) in the order of the boxes, and seconds: of preparing CLIP's input, and of CLIP."""
    rows, preparing, embedding = [], 0.0, 0.0
    since = time.perf_counter()
    for pixels, scaled in way.batches(pictures, boxes):
        ready = time.perf_counter()
        rows.append(way.embed(pixels, scaled))
        done = time.perf_counter()
        preparing, embedding, since = preparing + ready - since, embedding + done - ready, done
    return torch.cat(rows), preparing, embedding


def _figures(name: str, rates: list[tuple[float, float]], embeddings: Tensor, crops: Tensor, names: Tensor, labels: Tensor) -> WayFigures:
    """From rates (all, CLIP alone) a round, embeddings of labelled boxes (n, D) this way and as crops, names (K, D), labels (n,)."""
    together, alone = (statistics.median(of_rounds) for of_rounds in zip(*rates, strict=True))
    cosine = (embeddings * crops).sum(dim=1)
    right = (embeddings @ names.T).argmax(dim=1) == labels
    return WayFigures(name, together, alone, float(right.float().mean()), float(cosine.mean()), float(cosine.min()))


def _labelled(bench: DenseBench, protocol: Protocol, log: Callable[[str], None]) -> tuple[list[Tensor], list[np.ndarray], Tensor]:
    """Pictures (3, h, w) uint8, their boxes (n_i, 4) xyxy, and the labels of all boxes in their order."""
    split = bench.data.load("val2017", protocol, base_only=False, log=log)
    count = min(bench.images, len(split.images))
    images = [split.images[int(number)] for number in np.linspace(0, len(split.images) - 1, count)]
    pictures = [read_pixels(split, image) for image in images]
    return pictures, [image.boxes for image in images], torch.from_numpy(np.concatenate([image.labels for image in images]))


def _filled_up(labelled: Sequence[np.ndarray], pictures: Sequence[Tensor], count: int) -> tuple[list[np.ndarray], Tensor]:
    """Boxes of every picture, `count` at least, its labelled ones first, and which of all boxes are labelled (sum n_i,)."""
    rng, boxes, is_labelled = np.random.default_rng(0), [], []
    for picture, some in zip(pictures, labelled, strict=True):
        added = some[np.arange(max(0, count - len(some))) % len(some)]
        shift = np.tile(rng.uniform(-0.2, 0.2, (len(added), 2)) * (added[:, 2:] - added[:, :2]), 2)
        limit = np.array([picture.shape[2], picture.shape[1]] * 2)
        boxes.append(np.concatenate([some, np.clip(added + shift, 0, limit).astype(np.float32)]))
        is_labelled += [True] * len(some) + [False] * len(added)
    return boxes, torch.tensor(is_labelled)
