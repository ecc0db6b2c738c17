"""How fast extraction is beside the bare model, which stage limits it, and what a data set will cost. For `hdovd bench extract`.

Model only and end to end are measured in turns, on the same number of crops in the same batches; ratios are of one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from hdovd.cache.catalog import Catalog
from hdovd.cache.open import open_folder
from hdovd.cache.schema import ROW_ARRAYS, TABLE_ARRAYS, Level
from hdovd.cache.writer import ProductWriter
from hdovd.data.coco import DataPaths
from hdovd.pipelines.bench.bench_world import BenchWorld, make_world
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.format import duration, size
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe
from hdovd.pipelines.embedding.crops import CropJob, Cutter
from hdovd.pipelines.embedding.embedders import Crops, Pictures
from hdovd.pipelines.embedding.feed import GPU_THREADS, in_order, own_threads
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.engine import Extraction
from hdovd.pipelines.extraction.prepare import prepare
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

ROUND_S = 10.0  # how long a round of the bare model should take
PICTURES = 200  # files; more images are these again
OTHERS_CROPS = 120  # the ways of others are slow: on so many crops
WRITE_ROWS = 8_192


@dataclass(frozen=True, slots=True)
class SpeedBenchConfig:
    """`images`: None for as many as a round of 10 s takes; each has `boxes` boxes. `folder`: an empty one to work in.

    `pretrained`: None for random weights, which are as fast as any. `rows`: of the data set that the forecast is for, with its `pictures`.
    """

    folder: Path
    clip: str = "ViT-B-32"
    pretrained: str | None = None
    precision: Precision = Precision.AUTO
    device: str = "auto"
    workers: int | None = None
    batch_size: int | None = None
    images: int | None = None
    boxes: int = 30
    width: int = 640
    height: int = 480
    rounds: int = 3
    crop: CropRecipe = PLAIN_BOX
    pictures: int = 118_287
    rows: int = 118_287 * 37


@dataclass(frozen=True, slots=True)
class Speed:
    """Crops a second, of all cores and workers unless it says `a_core`; None for what this device has not.

    `crops`: a round's, of which `fill` only fill up the last batches; both count, for the model does both. `at_scale`: end to end
    where next to nothing has to be filled up: a crop's time in the model, and what all else adds for one that is no fill.
    `efficiency`: end to end / model only. `pil` and `files`: the ways of others, end to end, on the same boxes (see `_Stages`).
    """

    device: str
    precision: str
    cores: int
    workers: int
    batch_size: int
    crops: int
    fill: int
    model_only: float
    end_to_end: float
    at_scale: float
    efficiency: float
    decode_a_core: float
    cut_a_core: float
    prepare_a_core: float
    transfer: float | None
    write: float
    limit: str
    pil: float
    files: float
    pil_prepare_a_core: float
    peak_gpu_bytes: int | None
    forecast_seconds: float
    forecast_bytes: int

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"{self.device}, {self.precision}, batches of {self.batch_size}, {self.cores} cores, {self.workers} workers; "
                 f"{self.crops:,d} crops a round, {self.fill:,d} of them to fill up batches",
                 f"  model only          {self.model_only:10,.1f} crops/s",
                 f"  end to end          {self.end_to_end:10,.1f} crops/s   efficiency {self.efficiency:.3f}",
                 f"  of many images      {self.at_scale:10,.1f} crops/s",
                 f"  decode              {self.decode_a_core:10,.0f} crops/s a core",
                 f"  crop and resize     {self.cut_a_core:10,.0f} crops/s a core",
                 f"  both: preparation   {self.prepare_a_core:10,.0f} crops/s a core"]
        shown += [] if self.transfer is None else [f"  transfer            {self.transfer:10,.0f} crops/s"]
        shown += [f"  write               {self.write:10,.0f} rows/s",
                  f"  what limits: {self.limit}",
                  "others' ways on the same boxes, end to end:",
                  f"  a PIL crop a box    {self.pil:10,.1f} crops/s   hdovd is {self.at_scale / self.pil:.2f} times as fast "
                  f"(preparation alone: {self.prepare_a_core / self.pil_prepare_a_core:.1f} times)",
                  f"  a file a crop       {self.files:10,.1f} crops/s   hdovd is {self.at_scale / self.files:.2f} times as fast",
                  f"forecast: {duration(self.forecast_seconds)} on this machine, {size(self.forecast_bytes)} on disk"
                  + ("" if self.peak_gpu_bytes is None else f", {size(self.peak_gpu_bytes)} of GPU memory")]
        return shown

    def tree(self) -> dict[str, Any]:
        """For programs: JSON values."""
        return asdict(self)


def bench_speed(bench: SpeedBenchConfig, log: Callable[[str], None] = print) -> Speed:
    """Make pictures and boxes in `bench.folder`, and measure."""
    clip = load_clip(bench.clip, bench.pretrained, device=bench.device, precision=bench.precision,
                     random_weights=bench.pretrained is None and ":" not in bench.clip)
    batch_size = bench.batch_size or clip.best_batch()
    workers = workers_for(clip.device, bench.workers)
    bench = replace(bench, batch_size=batch_size, workers=workers)
    pixels = torch.randint(256, (batch_size, *clip.input_size, 3), dtype=torch.uint8, device=clip.device).permute(0, 3, 1, 2)
    guess = [_model_only(clip, pixels, 2 * torch.get_num_threads()) for _ in range(2)][1]  # the first prepares what later ones use
    scales = len(bench.crop.scales)
    images = bench.images or max(4, round(guess * ROUND_S / (bench.boxes * scales + 1)))
    log(f"making {images:,d} pictures of {bench.width}x{bench.height} with {bench.boxes} boxes each")
    proposals, files = max(1, bench.boxes // 2), min(images, PICTURES)
    make_world(bench.folder, BenchWorld(images, bench.boxes - proposals, proposals, files, bench.width, bench.height, "jpg"))
    begun = _extraction(bench, clip, "stages")
    stages, sizes = _Stages(begun, clip, bench.crop), _batch_sizes(begun, batch_size)
    crops, rounds = sum(sizes), []
    log(f"every round embeds {crops:,d} crops in {len(sizes)} batches")
    for number in range(bench.rounds):
        extraction = _extraction(bench, clip, f"round {number}")
        rounds.append((_model_only(clip, pixels, len(sizes)), crops / _end_to_end(extraction)))
    model_only, end_to_end = (median(values) for values in zip(*rounds, strict=True))
    real = images * (bench.boxes * scales + 1)
    at_scale = 1 / (1 / model_only + max(0.0, 1 / end_to_end - 1 / model_only) * crops / real)
    decode, cut, transfer, write = stages.decode(), stages.cut(), stages.transfer(batch_size), _write(bench.folder, clip.dim)
    prepare_rate, cores = 1 / (1 / decode + 1 / cut), torch.get_num_threads()
    pil, pil_prepare = stages.pil_way()
    seconds = {"the model": 1 / model_only, "preparation": 1 / (prepare_rate * (workers or cores)), "writing": 1 / write,
               "transfer to the GPU": 0.0 if transfer is None else 1 / transfer}
    a_box = sum(np.dtype(dtype).itemsize * (clip.dim if wide else 1) for dtype, wide in ROW_ARRAYS[Level.INSTANCE].values())
    a_box += sum(np.dtype(TABLE_ARRAYS[Level.BOXES][name]).itemsize for name in ("source", "score", "annotation_id")) + 2 * 4 * 4
    return Speed(
        device=torch.cuda.get_device_name(clip.device) if clip.device.type == "cuda" else "CPU", precision=str(clip.precision),
        cores=cores, workers=workers, batch_size=batch_size, crops=crops,
        fill=crops - real, model_only=model_only, end_to_end=end_to_end, at_scale=at_scale,
        efficiency=median(ours / model for model, ours in rounds), decode_a_core=decode, cut_a_core=cut, prepare_a_core=prepare_rate,
        transfer=transfer, write=write, limit=max(seconds, key=lambda name: seconds[name]), pil=pil, pil_prepare_a_core=pil_prepare,
        files=stages.files_way(bench.folder, batch_size), peak_gpu_bytes=clip.peak_memory_bytes(),
        forecast_seconds=(bench.rows * scales + bench.pictures) / at_scale,
        forecast_bytes=bench.rows * a_box + bench.pictures * 2 * clip.dim)


def _extraction(bench: SpeedBenchConfig, clip: ClipTeacher, name: str) -> Extraction:
    """The extraction of the world into a cache of its own, begun, its texts done."""
    world = bench.folder
    config = ExtractConfig(DataPaths(images=world / "images", annotations=world / "annotations.json"), world / name, bench.clip,
                           proposals=world / "proposals.json", recipe=bench.crop, batch_size=bench.batch_size, workers=bench.workers)
    extraction = prepare(config, lambda _: None, clip)
    extraction.begin(Catalog.create(config.cache))
    extraction.do(extraction.units()[0])
    return extraction


def _batch_sizes(extraction: Extraction, batch_size: int) -> list[int]:
    """Of all batches that an extraction of pictures and boxes puts through the model."""
    sizes = []
    for level in (Level.IMAGE, Level.INSTANCE):
        plan, way = extraction.plans[level], extraction.embedders[level]
        for first in range(0, plan.rows, plan.part_rows):
            sizes += [way.places(batch_size)] * len(way.groups(np.arange(first, min(first + plan.part_rows, plan.rows)), batch_size))
    return sizes


def _end_to_end(extraction: Extraction) -> float:
    """Seconds from picture files to rows on disk."""
    since = time.perf_counter()
    extraction.do(extraction.units()[1])
    return time.perf_counter() - since


def _model_only(clip: ClipTeacher, pixels: torch.Tensor, batches: int) -> float:
    """Crops a second of the model, its inputs in place; by the threads that extraction uses."""
    threads = GPU_THREADS if clip.device.type == "cuda" else torch.get_num_threads()
    with own_threads(threads) as pool:
        since = time.perf_counter()
        for _ in in_order(pool, lambda _: clip.embed_images(pixels), range(batches), 2 * threads):
            pass
        return batches * len(pixels) / (time.perf_counter() - since)


class _Stages:
    """Single stages, each alone, on some of the pictures of a round."""

    def __init__(self, extraction: Extraction, clip: ClipTeacher, recipe: CropRecipe) -> None:
        self._clip, self._cutter = clip, Cutter(clip.fit, clip.input_size)
        split, table = extraction.split, extraction.table
        count = min(len(split.images), max(4, -(-OTHERS_CROPS // len(recipe.scales) // max(1, int(table.offset[1])))))
        pictures = Pictures(split.images, split.path, table.offset, table.box)
        self._jobs = Crops(clip, pictures, recipe).jobs(np.arange(table.offset[count]))
        self._crops = sum(job.count for job in self._jobs)

    def decode(self) -> float:
        """Crops a second of one core that only reads pictures."""
        return self._rate(lambda: [self._cutter.read(job) for job in self._jobs])

    def cut(self) -> float:
        """Crops a second of one core that only cuts and resizes what is read."""
        pictures = [self._cutter.read(job) for job in self._jobs]
        return self._rate(lambda: [list(self._cutter.crops(read.pixels, job)) for read, job in zip(pictures, self._jobs, strict=True)])

    def transfer(self, batch_size: int) -> float | None:
        """Crops a second on their way to the GPU."""
        if self._clip.device.type != "cuda":
            return None
        pixels = torch.zeros(batch_size, 3, *self._clip.input_size, dtype=torch.uint8).pin_memory()
        torch.cuda.synchronize(self._clip.device)
        since = time.perf_counter()
        for _ in range(50):
            pixels.to(self._clip.device, non_blocking=True)
        torch.cuda.synchronize(self._clip.device)
        return 50 * batch_size / (time.perf_counter() - since)

    def pil_way(self) -> tuple[float, float]:
        """Crops a second of what most projects do, and of one core that only prepares that way: every crop cut by Pillow and put
        through open_clip's transform, a batch an image."""
        transform, spent = self._clip.reference_transform(), 0.0
        since = time.perf_counter()
        for job in self._jobs:
            begun = time.thread_time()
            pixels = torch.stack([transform(crop) for crop in self._pil_crops(job)])
            spent += time.thread_time() - begun
            self._clip.embed_preprocessed(pixels)
        return self._crops / (time.perf_counter() - since), self._crops / spent

    def files_way(self, folder: Path, batch_size: int) -> float:
        """Crops a second when every crop becomes a JPEG file, and all files are read and embedded, as clip-retrieval would have it."""
        transform, since = self._clip.reference_transform(), time.perf_counter()
        (folder / "crops").mkdir()
        files = []
        for job in self._jobs:
            for number, crop in enumerate(self._pil_crops(job)):
                files.append(folder / "crops" / f"{job.image_id}-{number}.jpg")
                crop.save(files[-1], quality=95)
        for first in range(0, len(files), batch_size):
            self._clip.embed_preprocessed(torch.stack([transform(Image.open(file)) for file in files[first : first + batch_size]]))
        return self._crops / (time.perf_counter() - since)

    def _pil_crops(self, job: CropJob) -> Iterator[Image.Image]:
        picture = read_image(job.path, job.width, job.height)
        assert job.regions is not None
        return (picture.crop(region) for region in job.regions.tolist())

    def _rate(self, work: Callable[[], object]) -> float:
        """Crops a second of the processor time that `work` takes on one thread; the best of three."""
        def seconds() -> float:
            begun = time.thread_time()
            work()
            return time.thread_time() - begun

        with own_threads(1) as pool:
            return self._crops / min(pool.submit(seconds).result() for _ in range(3))


def _write(folder: Path, dim: int) -> float:
    """Rows a second written to the cache."""
    writer = ProductWriter.begin(open_folder(folder / "written"), Level.CLASS, {"made": "up"}, rows=WRITE_ROWS, part_rows=WRITE_ROWS,
                                 dim=dim, names=[""] * WRITE_ROWS)
    rows = np.zeros((WRITE_ROWS, dim), np.float16)
    rows[:, 0] = 1
    since = time.perf_counter()
    writer.write_part(0, {"embedding": rows})
    return WRITE_ROWS / (time.perf_counter() - since)
