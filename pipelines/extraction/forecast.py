"""How fast extraction is beside the bare model, which stage limits it, and what a data set will cost: `hdovd bench
extract`.

Model only and end to end are measured in turns, on the same number of crops in the same batches; ratios are of one run.
What is extracted are made-up pictures and boxes in COCO's forms.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from hdovd.cache import TABLE_ARRAYS, Catalog, Level
from hdovd.cache.store import open_folder
from hdovd.cache.writer import ProductWriter
from hdovd.core import log, quiet
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.common.console import duration, size
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.embedding.embedders import GPU_THREADS, Cutter, in_order, own_threads
from hdovd.pipelines.extraction.config import ExtractConfig, ForecastConfig
from hdovd.pipelines.extraction.engine import Extraction
from hdovd.pipelines.extraction.extract_clip import prepare
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip


def make_world(
    folder: Path,
    images: int,
    *,
    base_boxes: int,
    proposals: int,
    size: tuple[int, int],
    pictures: int | None = None,
    file_type: str = "jpg",
) -> None:
    """Write `images/`, annotations.json and proposals.json, item by item: in as little memory for millions as for one.

    Args:
        base_boxes: annotations an image.
        proposals: boxes an image in the other file.
        size: width and height, pixels.
        pictures: how many files there are, which are all images over and over; None: one an image.
    """
    (folder / "images").mkdir(parents=True)
    rng, pictures, (width, height) = np.random.default_rng(0), pictures or images, size
    for number in range(pictures):
        pixels = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / "images" / f"{number}.{file_type}", quality=90)

    def boxes(count: int) -> Iterator[dict[str, object]]:
        for image in range(images):
            found = np.concatenate([rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))], axis=1) * [
                *size,
                *size,
            ]
            for box, score in zip(found.round(2).tolist(), rng.uniform(0, 1, count).round(4).tolist(), strict=True):
                yield {"image_id": image, "bbox": box, "score": score}

    _write(
        folder / "annotations.json",
        {
            "categories": (
                {"id": number, "name": name} for number, name in enumerate(load_protocol("ov-coco").names, 1)
            ),
            "images": (
                {"id": k, "file_name": f"{k % pictures}.{file_type}", "width": width, "height": height}
                for k in range(images)
            ),
            "annotations": (box | {"id": k, "category_id": 1, "iscrowd": 0} for k, box in enumerate(boxes(base_boxes))),
        },
    )
    _write(folder / "proposals.json", boxes(proposals))


def _write(file: Path, content: Iterator[object] | dict[str, Iterator[object]]) -> None:
    """One list, or several by name, as JSON."""
    lists = content if isinstance(content, dict) else {"": content}
    with file.open("w") as out:
        for number, (name, items) in enumerate(lists.items()):
            out.write((f'{"," if number else "{"} "{name}": ' if name else "") + "[")
            out.writelines((",\n" if k else "") + json.dumps(item) for k, item in enumerate(items))
            out.write("]")
        out.write("}" if isinstance(content, dict) else "")


ROUND_S = 10.0  # how long a round of the bare model should take
PICTURES = 200  # files; more images are these again
STAGE_BOXES = 120  # boxes, at least, on which a single stage is measured
WRITE_ROWS = 8_192


def forecast_lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    gpu = "" if found["peak_gpu_bytes"] is None else f", {size(found['peak_gpu_bytes'])} of GPU memory"
    return [
        f"{found['device']}, {found['precision']}, batches of {found['batch_size']}, {found['cores']} cores, "
        f"{found['workers']} workers; {found['crops']:,d} crops a round, {found['fill']:,d} of them to fill up batches",
        f"  model only          {found['model_only']:10,.1f} crops/s",
        f"  end to end          {found['end_to_end']:10,.1f} crops/s   efficiency {found['efficiency']:.3f}",
        f"  of many images      {found['at_scale']:10,.1f} crops/s",
        *(
            f"  {name:20s}{rate:10,.0f} {'rows' if name == 'writing' else 'crops'}/s"
            for name, rate in found["stages"].items()
        ),
        f"  what limits: {found['limit']}",
        f"forecast: {duration(found['seconds'])} on this machine, {size(found['disk_bytes'])} on disk{gpu}",
    ]


def forecast(config: ForecastConfig, folder: Path) -> dict[str, Any]:
    """Make pictures and boxes in `folder`, which is empty, extract them, and measure: as JSON values.

    Rates are crops (rows for writing) a second of the whole machine. `crops`: of a round, of which `fill` only fill up
    the last batches; both count, for the model does both. `at_scale`: end to end where next to nothing has to be filled
    up: a crop's time in the model, and what all else adds for one that is no fill. `efficiency`: the median over rounds
    of end to end / model only. `stages`: what each would do if it were alone.
    """
    clip = load_clip(
        config.clip,
        config.pretrained,
        device=config.device,
        precision=config.precision,
        random_weights=config.pretrained is None and ":" not in config.clip,
    )
    workers, batch_size = workers_for(clip.device, config.workers), config.batch_size or clip.best_batch()
    config = replace(config, batch_size=batch_size, workers=workers, folder=folder)
    pixels = torch.randint(256, (batch_size, *clip.input_size, 3), dtype=torch.uint8, device=clip.device)
    pixels = pixels.permute(0, 3, 1, 2)
    cores = torch.get_num_threads()
    _model_only(clip, pixels, 2 * cores)  # prepares what later calls use
    of_image = config.boxes * len(config.crop.scales) + 1  # crops
    images = config.images or max(4, round(_model_only(clip, pixels, 2 * cores) * ROUND_S / of_image))
    log(f"making {images:,d} pictures of {config.picture[0]}x{config.picture[1]} with {config.boxes} boxes each")
    proposals = max(1, config.boxes // 2)
    make_world(
        folder,
        images,
        base_boxes=config.boxes - proposals,
        proposals=proposals,
        size=config.picture,
        pictures=min(images, PICTURES),
    )
    sizes, rounds = _batch_sizes(_begun(config, clip, folder, "stages"), batch_size), []
    crops, real = sum(sizes), images * of_image
    log(f"every round embeds {crops:,d} crops in {len(sizes)} batches")
    for number in range(config.rounds):
        extraction = _begun(config, clip, folder, f"round {number}")
        bare = _model_only(clip, pixels, len(sizes))
        rounds.append((bare, crops / _seconds(partial(extraction.do, extraction.units()[1]))))
    model_only, end_to_end = (median(values) for values in zip(*rounds, strict=True))
    at_scale = 1 / (1 / model_only + max(0.0, 1 / end_to_end - 1 / model_only) * crops / real)
    stages = {
        "preparation": _preparation(_begun(config, clip, folder, "preparation"), workers or cores),
        "writing": _writing(folder, clip.dim),
    }
    rates = {"the model": model_only} | stages
    of_images, of_boxes = config.data_set
    in_boxes = sum(np.dtype(TABLE_ARRAYS[Level.BOXES][name]).itemsize for name in ("source", "score", "annotation_id"))
    return {
        "device": torch.cuda.get_device_name(clip.device) if clip.device.type == "cuda" else "CPU",
        "precision": str(clip.precision),
        "cores": cores,
        "workers": workers,
        "batch_size": batch_size,
        "crops": crops,
        "fill": crops - real,
        "model_only": model_only,
        "end_to_end": end_to_end,
        "at_scale": at_scale,
        "efficiency": median(ours / model for model, ours in rounds),
        "stages": stages,
        "limit": min(rates, key=lambda name: rates[name]),
        "seconds": (of_boxes * len(config.crop.scales) + of_images) / at_scale,
        "disk_bytes": of_boxes * (2 * clip.dim + in_boxes + 2 * 4 * 4) + of_images * 2 * clip.dim,  # float16; two boxes
        "peak_gpu_bytes": clip.peak_memory_bytes(),
    }


def _begun(config: ForecastConfig, clip: ClipTeacher, world: Path, name: str) -> Extraction:
    """The extraction of the world into a cache of its own, begun, its texts done."""
    extract = ExtractConfig(
        data=DataPaths(images=world / "images", annotations=world / "annotations.json"),
        cache=world / name,
        clip=config.clip,
        proposals=world / "proposals.json",
        recipe=config.crop,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    with quiet():
        extraction = prepare(extract, clip)
    extraction.begin(Catalog.create(extract.cache))
    extraction.do(extraction.units()[0])
    return extraction


def _batch_sizes(extraction: Extraction, batch_size: int) -> list[int]:
    """Sizes of all batches that the extraction of pictures and boxes puts through the model."""
    sizes = []
    for level in (Level.IMAGE, Level.INSTANCE):
        plan, embedder = extraction.plans[level], extraction.embedders[level]
        for first in range(0, plan.rows, plan.part_rows):
            groups = embedder.groups(np.arange(first, min(first + plan.part_rows, plan.rows)), batch_size)
            sizes += [embedder.places(batch_size)] * len(groups)
    return sizes


def _model_only(clip: ClipTeacher, pixels: torch.Tensor, batches: int) -> float:
    """Crops a second of the model, its inputs in place; by the threads that extraction uses."""
    threads = GPU_THREADS if clip.device.type == "cuda" else torch.get_num_threads()
    with own_threads(threads) as pool:
        run = in_order(pool, lambda _: clip.embed_images(pixels), range(batches), 2 * threads)
        return batches * len(pixels) / _seconds(lambda: list(run))


def _preparation(extraction: Extraction, processes: int) -> float:
    """Crops a second that so many processes read, cut and resize, from what one core takes for some boxes; the best of
    three.
    """
    embedder, offset = extraction.embedders[Level.INSTANCE], extraction.table.offset
    jobs = embedder.jobs(np.arange(offset[np.searchsorted(offset, min(STAGE_BOXES, offset[-1]))]))
    cutter, crops = Cutter(embedder.fit, embedder.input_size), sum(job.count for job in jobs)
    prepare = partial(cutter.batch, jobs, crops)
    with own_threads(1) as pool:
        return processes * crops / min(pool.submit(_seconds, prepare, time.thread_time).result() for _ in range(3))


def _writing(folder: Path, dim: int) -> float:
    """Rows a second written to the cache."""
    writer = ProductWriter.begin(
        open_folder(folder / "written"),
        Level.CLASS,
        {"made": "up"},
        rows=WRITE_ROWS,
        part_rows=WRITE_ROWS,
        dim=dim,
        names=[""] * WRITE_ROWS,
    )
    rows = np.eye(1, dim, dtype=np.float16).repeat(WRITE_ROWS, axis=0)
    return WRITE_ROWS / _seconds(lambda: writer.write_part(0, {"embedding": rows}))


def _seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    since = clock()
    work()
    return clock() - since
