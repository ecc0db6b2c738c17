"""The dense instance teacher beside crops, on the same labelled boxes in the same run: rate, cosine, zero-shot
accuracy.

    python benchmarks/run.py bench_dense --clip CLIP --data COCO [--sides 448 672]

What `extract-clip --instance-teacher dense` would give to train from. Needs no cache. Boxes of all classes are read,
novel ones too, as evaluation reads them. Without `--data`: the demo's world and random weights, for the rates alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arguments import parsed, workplace
from torch import Tensor

from hdovd.cache import Level
from hdovd.core import HdovdError
from hdovd.data import DataPaths, Exif, ImageBoxes, load_protocol
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.demo.world import make_world
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, DenseRecipe
from hdovd.pipelines.embedding.embedders import Cutter, Embedder, Picture, Pictures, embedders_of, read_picture
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

NO_PICTURES = Pictures([], lambda _: Path(), np.zeros(1, np.int64), np.zeros((0, 4), np.float32))


@dataclass(frozen=True)
class DenseBench:
    """`sides`: of the dense input, in pixels; 0 for the default of extraction.

    `images`: so many of val2017, spread over the list; their pictures stay in memory. `boxes`: so many a picture at
    least, for a dense pass costs a picture first of all: shifted copies of the labelled ones are added, which count for
    the rates alone. `batch_size` in crops. `rounds`: every way is timed once in each; medians count.
    """

    data: Path | None = None
    clip: str = "ViT-B-32"
    pretrained: str | None = None
    sides: tuple[int, ...] = (0,)
    protocol: str = "ov-coco"
    precision: Precision = Precision.AUTO
    device: str = "auto"
    images: int = 200
    boxes: int = 30
    batch_size: int = 256
    rounds: int = 3


@dataclass(frozen=True)
class Way:
    """One way to embed the boxes. `per_s`: boxes a second from decoded pictures to embeddings; `model_per_s`: without
    preparing CLIP's input. `accuracy`: boxes whose class is the most similar of all. Cosines: to the crop of the same
    box; 1 for crops.
    """

    name: str
    per_s: float
    model_per_s: float
    accuracy: float
    cosine_mean: float
    cosine_min: float


def bench_dense(bench: DenseBench, data: Path) -> list[Way]:
    """Embed the same boxes as crops and densely at every side, compare, and print. Raises HdovdError for bad input."""
    protocol = load_protocol(bench.protocol)
    teacher = load_clip(
        bench.clip,
        bench.pretrained,
        device=bench.device,
        precision=bench.precision,
        random_weights=bench.pretrained is None and ":" not in bench.clip,
    )
    sides = [
        _dense(teacher, NO_PICTURES, side).input_size[0] for side in bench.sides
    ]  # refused before pictures are read
    split = DataPaths(data).load("val2017", protocol, base_only=False)
    if not split.images:
        raise HdovdError(f"{data} has no labelled box in val2017")
    chosen = np.linspace(0, len(split.images) - 1, min(bench.images, len(split.images))).astype(int)
    images = [split.images[number] for number in chosen]
    memory = {
        split.path(image): read_picture(split.path(image), image.width, image.height, split.exif) for image in images
    }
    boxes, is_labelled = filled_up(images, bench.boxes)
    labels = torch.from_numpy(np.concatenate([image.labels for image in images]))
    pictures = Pictures(images, split.path, np.cumsum([0, *map(len, boxes)]), np.concatenate(boxes))
    names = torch.from_numpy(teacher.embed_names(protocol.names, DEFAULT_TEMPLATES))
    embedders = {"crops": embedders_of(teacher, pictures, PLAIN_BOX)[Level.INSTANCE]}
    embedders |= {f"dense {side}": _dense(teacher, pictures, side) for side in sides}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in embedders}
    rows: dict[str, Tensor] = {}
    for _ in range(bench.rounds):  # all in turn, again and again: other work on the machine slows whichever is running
        for name, embedder in embedders.items():
            embeddings, preparing, embedding = _run(embedder, bench.batch_size, lambda path, *_: memory[path])
            rates[name].append((len(embeddings) / (preparing + embedding), len(embeddings) / embedding))
            rows[name] = embeddings[is_labelled]
    ways = []
    for name, found in rows.items():
        together, alone = (statistics.median(of_rounds) for of_rounds in zip(*rates[name], strict=True))
        cosine, right = (found * rows["crops"]).sum(dim=1), (found @ names.T).argmax(dim=1) == labels
        ways.append(Way(name, together, alone, float(right.float().mean()), float(cosine.mean()), float(cosine.min())))
    print(
        f"{len(is_labelled):,d} boxes of {len(images):,d} images; accuracy among {len(protocol.names)} classes and "
        f"cosines to crops of the {len(labels):,d} that are "
        f"labelled\n{'':12s}{'boxes/s':>10s}{'of crops':>10s}{'model alone':>13s}{'accuracy':>10s}"
        f"{'cosine mean':>13s}{'min':>8s}"
    )
    for way in ways:
        print(
            f"{way.name:12s}{way.per_s:10,.1f}{way.per_s / ways[0].per_s:10.2f}{way.model_per_s:13,.1f}{way.accuracy:10.3f}"  # noqa: E501
            f"{way.cosine_mean:13.3f}{way.cosine_min:8.3f}"
        )
    return ways


def _dense(teacher: ClipTeacher, pictures: Pictures, side: int) -> Embedder:
    return embedders_of(teacher, pictures, DenseRecipe(side or None))[Level.INSTANCE]


def _run(
    embedder: Embedder, batch_size: int, picture: Callable[[Path, int, int, Exif], Picture]
) -> tuple[Tensor, float, float]:
    """Embeddings (n, D) of all boxes, and seconds: of preparing CLIP's input from pictures in memory, and of CLIP."""
    cutter, embeddings, preparing, embedding = (
        Cutter(embedder.fit, embedder.input_size, picture),
        list[np.ndarray](),
        0.0,
        0.0,
    )
    for rows in embedder.groups(np.arange(len(embedder.pictures.box)), batch_size):
        since = time.perf_counter()
        batch = cutter.batch(embedder.jobs(rows), embedder.places(batch_size))
        ready = time.perf_counter()
        embeddings.append(embedder.encode(batch)[: len(rows)])
        preparing, embedding = preparing + ready - since, embedding + time.perf_counter() - ready
    return torch.from_numpy(np.concatenate(embeddings)), preparing, embedding


def filled_up(images: Sequence[ImageBoxes], count: int) -> tuple[list[np.ndarray], Tensor]:
    """Boxes of every image, `count` at least, its labelled ones first, and which of all boxes are labelled (sum
    n_i,)."""
    rng, boxes, is_labelled = np.random.default_rng(0), [], []
    for image in images:
        some = image.boxes
        added = some[np.arange(max(0, count - len(some))) % len(some)]
        shift = np.tile(rng.uniform(-0.2, 0.2, (len(added), 2)) * (added[:, 2:] - added[:, :2]), 2)
        limit = np.array([image.width, image.height] * 2)
        boxes.append(np.concatenate([some, np.clip(added + shift, 0, limit).astype(np.float32)]))
        is_labelled += [True] * len(some) + [False] * len(added)
    return boxes, torch.tensor(is_labelled)


if __name__ == "__main__":
    with workplace() as place:
        asked = parsed(DenseBench, __doc__)
        if asked.data is None:
            make_world(place / "world", train_images=1, val_images=asked.images, seed=0, workers=1)
            asked = DenseBench(**vars(asked) | {"protocol": str(place / "world" / "protocol.toml")})
        bench_dense(asked, asked.data or place / "world")
