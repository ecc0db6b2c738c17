"""Reading speed of the cache beside other layouts of the same features: memory-mapped .npy, a .pth an image,
safetensors.

    python benchmarks/run.py bench_cache [--workers 4] [--memory-limit 2000]

The defaults make 3.3 GB. Layouts are read in short rounds of all of them, since other work on the machine slows
whichever is being read; a ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import parsed, workplace
from memory_limit import memory_limit
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from hdovd.cache import PART_ROWS, Catalog, FeatureSet, Level
from hdovd.cache.reader import FeatureCache
from hdovd.cache.writer import ProductWriter
from hdovd.pipelines.common.console import size
from hdovd.pipelines.dataloading.loader import Packed, Streams, block_shuffle, pack

BATCH = 16  # images, with workers
MIN_SHARE = 0.1  # slower layouts are not read as a whole
PTH_KEY = "proposal_clip_image_embedding"


@dataclass(frozen=True)
class CacheBench:
    """`images` of `rows` rows of `dim` values. `reads`: images of a round. `workers`: read with a DataLoader of so many
    too.

    `memory_limit`: MB of memory and page cache to read with, cold; 0 for no limit.
    """

    images: int = 20_000
    rows: int = 40
    dim: int = 512
    rounds: int = 15
    reads: int = 4_000
    workers: int = 0
    memory_limit: int = 0
    part_rows: int = PART_ROWS

    @property
    def ids(self) -> list[int]:
        """Image ids with gaps, as COCO has them."""
        return [7 * number + 1 for number in range(self.images)]


class Layout(NamedTuple):
    """One way to keep features. `read`: an image id in, a fresh (n, D) float16 array out. `share` of a round's reads,
    less than one where reads are slow. `in_blocks`: read in block-shuffled order.
    """

    name: str
    read: Callable[[int], Any]
    share: float = 1.0
    in_blocks: bool = False


def make_layouts(folder: Path, bench: CacheBench) -> None:
    """The same random normalised features in every layout."""
    rng, offset, total = np.random.default_rng(0), np.arange(bench.images + 1) * bench.rows, bench.images * bench.rows
    rows = np.lib.format.open_memmap(folder / "embedding.npy", "w+", np.float16, (total, bench.dim))
    for start in range(0, total, PART_ROWS):
        block = rng.standard_normal((min(PART_ROWS, total - start), bench.dim), np.float32)
        rows[start : start + PART_ROWS] = block / np.linalg.norm(block, axis=1, keepdims=True)
    catalog = Catalog.create(folder / "cache")
    writer = ProductWriter.begin(
        catalog.folder,
        Level.INSTANCE,
        {"made_up": True},
        rows=total,
        part_rows=bench.part_rows,
        dim=bench.dim,
        tables={
            "image_id": np.array(bench.ids),
            "image_hash": np.zeros(bench.images, np.uint64),
            "offset": offset,
            "box": np.zeros((total, 4), np.float32),
        },
    )
    for part in range(writer.product.parts):
        start, stop = writer.product.rows_of(part)
        writer.write_part(part, {"embedding": rows[start:stop]})
    catalog.write_set("default", FeatureSet({Level.INSTANCE: writer.product.key}))
    tensors = {str(image): np.asarray(rows[offset[k] : offset[k + 1]]) for k, image in enumerate(bench.ids)}
    save_file(tensors, folder / "all.safetensors")
    (folder / "pth").mkdir()
    for image, mine in tensors.items():
        torch.save({PTH_KEY: torch.from_numpy(mine.copy())}, folder / "pth" / f"{image}.pth")


def open_layouts(folder: Path, bench: CacheBench) -> list[Layout]:
    """All layouts; ratios are to the first two."""
    mapped, row_of = (
        np.asarray(np.load(folder / "embedding.npy", mmap_mode="r")),
        {image: row for row, image in enumerate(bench.ids)},
    )
    tensors = safe_open(folder / "all.safetensors", "np")
    with_map, through_zarr = (FeatureCache(folder / "cache", mapped=way).instance_embeddings for way in (True, False))

    def memmap(image: int) -> np.ndarray:
        return mapped[row_of[image] * bench.rows : (row_of[image] + 1) * bench.rows].copy()

    def pth(image: int) -> np.ndarray:
        found: np.ndarray = torch.load(folder / "pth" / f"{image}.pth", weights_only=True)[PTH_KEY].numpy()
        return found

    return [
        Layout("memory-mapped .npy", memmap),
        Layout(".pth an image", pth, 0.1),
        Layout("safetensors", lambda image: tensors.get_tensor(str(image)), 0.5),
        Layout("cache, mapped", with_map),
        Layout("cache through Zarr, block-shuffled", through_zarr, in_blocks=True),
        Layout("cache through Zarr, random order", through_zarr, 0.02),
    ]


def check_same(layouts: Sequence[Layout], ids: Sequence[int]) -> None:
    """Raises SystemExit if a layout answers otherwise than the first."""
    for image in ids:
        expected = layouts[0].read(image)
        for layout in layouts[1:]:
            found = layout.read(image)
            if found.dtype != np.float16 or not np.array_equal(found, expected):
                raise SystemExit(
                    f"{layout.name} gives other rows for image {image} than {layouts[0].name}: a bug, please report it"
                )


def rates(
    bench: CacheBench,
    layouts: Sequence[Layout],
    seconds: Callable[[Layout, list[int]], float],
    *,
    rounds: int,
    workers: int = 0,
) -> dict[str, list[float]]:
    """Images per second by layout, a value a round; every layout is read once a round, by `seconds(layout, image
    ids)`."""
    found: dict[str, list[float]] = {layout.name: [] for layout in layouts}
    streams, rng = Streams(max(1, workers), BATCH), np.random.default_rng(1)
    for epoch in range(rounds):
        for turn in rng.permutation(len(layouts)):  # each suffers from what was read before it
            layout = layouts[turn]
            blocks = block_shuffle(bench.images, 0, streams, epoch)
            order = blocks if layout.in_blocks else rng.permutation(bench.images)
            count = min(bench.images, bench.reads if workers else max(1, int(bench.reads * layout.share)))
            ids = [bench.ids[number] for number in order[:count]]
            found[layout.name].append(len(ids) / seconds(layout, ids))
    return found


def here(layout: Layout, ids: list[int]) -> float:
    """Seconds to read images in this process."""
    read, since = layout.read, time.perf_counter()
    for image in ids:
        read(image)
    return time.perf_counter() - since


def by_workers(layout: Layout, ids: list[int], workers: int, collate: Callable[[list[Any]], Any]) -> float:
    """Seconds to take batches from worker processes, timed from the first batch to the last."""
    since = time.perf_counter()
    for number, batch in enumerate(DataLoader(_Images(layout, ids), BATCH, num_workers=workers, collate_fn=collate)):
        if isinstance(batch, Packed):
            batch.unpack()
        if number == 0 and len(ids) > BATCH:
            since = time.perf_counter()
    return (time.perf_counter() - since) * len(ids) / max(BATCH, len(ids) - BATCH)


class _Images(Dataset[torch.Tensor]):
    def __init__(self, layout: Layout, ids: list[int]) -> None:
        self.layout, self.ids = layout, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.layout.read(self.ids[index]))


def table(title: str, found: dict[str, list[float]]) -> list[str]:
    """A line a layout; the first two are what others are compared with."""

    def ratio(one: list[float], other: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(one, other, strict=True))

    memmap, pth = list(found.values())[:2]
    return [
        f"\n{title}, medians",
        f"{'':36s}{'images/s':>10s}{'of memmap':>11s}{'times .pth':>12s}",
        *(
            f"{name:36s}{statistics.median(own):10,.0f}{ratio(own, memmap):11.2f}{ratio(own, pth):12.1f}"
            for name, own in found.items()
        ),
    ]


def forget(folder: Path) -> None:
    """Have the system drop what it holds of these files in memory."""
    for file in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def bench_cache(folder: Path, bench: CacheBench) -> None:
    print(
        f"making {bench.images:,d} images of {bench.rows} rows of {bench.dim} float16 "
        f"({size(2 * bench.images * bench.rows * bench.dim)}) in every layout"
    )
    make_layouts(folder, bench)
    cold = bench.memory_limit > 0
    with memory_limit(bench.memory_limit * 10**6) if cold else nullcontext():
        if cold:
            forget(folder)
        layouts = open_layouts(folder, bench)
        some = [layout for layout in layouts if layout.share >= MIN_SHARE]
        if not cold:
            check_same(layouts, bench.ids[:: max(1, bench.images // 16)])
            for layout in some:
                here(layout, bench.ids)  # from now on in memory, and mapped
        how = f"memory and page cache held to {bench.memory_limit} MB" if cold else "warm"
        print(
            *table(f"one process, {how}, {bench.rounds} rounds", rates(bench, layouts, here, rounds=bench.rounds)),
            sep="\n",
        )
    if bench.workers and not cold:
        nothing = np.zeros((bench.rows, bench.dim), np.float16)
        some.append(Layout("nothing read: what the rest costs", lambda _: nothing))
        for name, collate in (("a list of tensors", list), ("one message (packing)", pack)):
            found = rates(
                bench,
                some,
                partial(by_workers, workers=bench.workers, collate=collate),
                rounds=max(1, bench.rounds // 3),
                workers=bench.workers,
            )
            print(
                *table(f"DataLoader, {bench.workers} workers, batches of {BATCH} handed over as {name}", found),
                sep="\n",
            )


if __name__ == "__main__":
    with workplace() as place:
        bench_cache(place, parsed(CacheBench, __doc__))
