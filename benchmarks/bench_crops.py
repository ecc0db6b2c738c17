"""The crops of `hdovd extract-clip` beside what others do, on the same boxes: preparation alone, by one core, and with
CLIP.

    python benchmarks/run.py bench_crops [--clip CLIP] [--picture 640 480]

A PIL crop a box: every crop is cut by Pillow and put through open_clip's transform, a batch an image, as most projects
do. A file a crop: every crop becomes a JPEG file, and all files are read and embedded, as clip-retrieval would have it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from arguments import parsed, workplace
from online_clip import reference_transform
from PIL import Image

from hdovd.cache import Level
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX
from hdovd.pipelines.embedding.embedders import Cutter, Pictures, embedders_of, own_threads
from hdovd.pipelines.extraction.forecast import make_world
from hdovd.pipelines.teachers.openclip import load_clip


@dataclass(frozen=True)
class CropBench:
    clip: str = "ViT-B-32"
    device: str = "auto"
    images: int = 4
    boxes: int = 30
    picture: tuple[int, ...] = (640, 480)
    batch_size: int = 64
    rounds: int = 3


def bench_crops(folder: Path, bench: CropBench) -> dict[str, list[tuple[float, float]]]:
    """Measure and print; returns seconds by way, a pair a round: of preparation on one core, and of all."""
    clip = load_clip(bench.clip, None, device=bench.device, random_weights=":" not in bench.clip)
    width, height = bench.picture
    make_world(folder, bench.images, base_boxes=bench.boxes, proposals=0, size=(width, height))
    paths = DataPaths(images=folder / "images", annotations=folder / "annotations.json")
    split = paths.load("train2017", load_protocol("ov-coco"), base_only=True)
    boxes = [image.boxes for image in split.images]
    pictures = Pictures(split.images, split.path, np.cumsum([0, *map(len, boxes)]), np.concatenate(boxes))
    embedder, transform = embedders_of(clip, pictures, PLAIN_BOX)[Level.INSTANCE], reference_transform(clip)
    cutter, jobs = Cutter(embedder.fit, embedder.input_size), embedder.jobs(np.arange(len(pictures.box)))

    def crops(number: int) -> list[Image.Image]:
        job = jobs[number]
        assert job.regions is not None
        picture = read_image(job.path, job.image.width, job.image.height)
        return [picture.crop(region) for region in job.regions.tolist()]

    def ours() -> Iterator[torch.Tensor]:
        for rows in embedder.groups(np.arange(len(pictures.box)), bench.batch_size):
            yield cutter.batch(embedder.jobs(rows), len(rows)).pixels

    def pillow() -> Iterator[torch.Tensor]:
        for number in range(len(jobs)):
            yield torch.stack([transform(crop) for crop in crops(number)])

    def files() -> Iterator[torch.Tensor]:
        (folder / "crops").mkdir(exist_ok=True)
        written = []
        for number, job in enumerate(jobs):
            for k, crop in enumerate(crops(number)):
                written.append(folder / "crops" / f"{job.image.id}-{k}.jpg")
                crop.save(written[-1], quality=95)
        for first in range(0, len(written), bench.batch_size):
            yield torch.stack([transform(Image.open(file)) for file in written[first : first + bench.batch_size]])

    ways = {
        "hdovd": (ours, clip.embed_images),
        "a PIL crop a box": (pillow, clip.embed_preprocessed),
        "a file a crop": (files, clip.embed_preprocessed),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(bench.rounds + 1):
        for name, (batches, embed) in ways.items():
            with own_threads(1) as pool:
                preparation = pool.submit(_seconds, partial(_all, batches), time.thread_time).result()
            whole = _seconds(partial(_all, batches, embed), time.perf_counter)
            if number:  # the first round warms up
                found[name].append((preparation, whole))
    print(
        f"{len(pictures.box)} boxes; medians of {bench.rounds} "
        f"rounds\n{'':20s}{'preparation, crops/s a core':>28s}{'of hdovd':>10s}"
        f"{'all, crops/s':>14s}{'of hdovd':>10s}"
    )
    for name, seconds in found.items():
        shown = []
        for own, base in zip(zip(*seconds, strict=True), zip(*found["hdovd"], strict=True), strict=True):
            shown.append((len(pictures.box) / median(own), median(b / a for a, b in zip(own, base, strict=True))))
        print(f"{name:20s}{shown[0][0]:28,.0f}{shown[0][1]:10.2f}{shown[1][0]:14,.1f}{shown[1][1]:10.2f}")
    return found


def _all(batches: Callable[[], Iterator[Any]], embed: Callable[[Any], object] = lambda batch: batch) -> None:
    _ = [embed(batch) for batch in batches()]


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    since = clock()
    work()
    return clock() - since


if __name__ == "__main__":
    with workplace() as place:
        bench_crops(place, parsed(CropBench, __doc__))
