"""Reading speed of the cache against other layouts of the same features, in one run on one machine.

Called by `hdovd bench cache`. Layouts are read in short rounds of all of them, since other work on the machine slows
whichever is being read; a ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdovd.pipelines.bench.bench_layouts import CacheBenchConfig, Layout, Nothing, check_same, make_layouts, open_layouts
from hdovd.pipelines.bench.memory_limit import memory_limit
from hdovd.pipelines.common.format import size
from hdovd.pipelines.dataloading.packing import Packed, pack
from hdovd.pipelines.dataloading.sampler import BlockShuffle, Streams

BATCH = 16  # images, with workers
MIN_SHARE = 0.1  # slower layouts are not read as a whole


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second of one layout, a value a round. `images`: read in a round."""

    name: str
    images: int
    per_s: list[float]

    def ratio(self, other: Rates) -> float:
        """Median over the rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.per_s, other.per_s, strict=True))


def bench_cache(bench: CacheBenchConfig, log: Callable[[str], None] = print) -> None:
    """Make the layouts, read them, and print the tables."""
    count = 2 * bench.images * bench.rows * bench.dim
    log(f"making {bench.images:,d} images of {bench.rows} rows of {bench.dim} float16 ({size(count)}) in every layout")
    make_layouts(bench)
    if bench.memory_limit is not None:
        with memory_limit(bench.memory_limit):
            forget([file for file in bench.folder.rglob("*") if file.is_file()])
            _print(f"one process, memory and page cache held to {size(bench.memory_limit)}, {bench.rounds} rounds",
                   time_reading(bench, open_layouts(bench)), log)
        return
    layouts = open_layouts(bench)
    check_same(bench, layouts, bench.ids[:: max(1, bench.images // 16)])
    some = [layout for layout in layouts if layout.share >= MIN_SHARE]
    for layout in some:
        for image_id in bench.ids:
            layout.read(image_id)  # from now on in memory, and mapped
    _print(f"one process, warm, {bench.rounds} rounds", time_reading(bench, layouts), log)
    if bench.workers:
        for name, collate in (("a list of tensors", list), ("one message (packing)", pack)):
            title = f"DataLoader, {bench.workers} workers, batches of {BATCH} handed over as {name}"
            _print(title, time_workers(bench, [*some, Nothing(bench)], collate), log)
        log(f"{Nothing.name}: what handing over costs by itself; no layout can be faster")


def time_rounds(bench: CacheBenchConfig, layouts: Sequence[Layout], rounds: int, reads: Callable[[Layout], int],
                run: Callable[[Layout, list[int]], float], *, workers: int = 0) -> list[Rates]:
    """Rates from the seconds that `run(layout, image ids)` says; every layout once a round."""
    rates = [Rates(layout.name, min(bench.images, max(1, reads(layout))), []) for layout in layouts]
    ids, rng = bench.ids, np.random.default_rng(1)
    blocks = BlockShuffle(bench.images, seed=0, streams=Streams(max(1, workers), BATCH))
    for epoch in range(rounds):
        for turn in rng.permutation(len(layouts)):  # each suffers from what was read before it
            layout, rate = layouts[turn], rates[turn]
            order = blocks.indices(epoch).tolist() if layout.in_blocks else rng.permutation(bench.images).tolist()
            rate.per_s.append(rate.images / run(layout, [ids[number] for number in order[: rate.images]]))
    return rates


def time_reading(bench: CacheBenchConfig, layouts: Sequence[Layout]) -> list[Rates]:
    """Read in this process."""

    def run(layout: Layout, ids: list[int]) -> float:
        read, since = layout.read, time.perf_counter()
        for image_id in ids:
            read(image_id)
        return time.perf_counter() - since

    return time_rounds(bench, layouts, bench.rounds, lambda layout: int(bench.reads * layout.share), run)


def time_workers(bench: CacheBenchConfig, layouts: Sequence[Layout], collate: Callable[[list[Any]], Any]) -> list[Rates]:
    """Take batches from worker processes, timed from the first batch to the last."""

    def run(layout: Layout, ids: list[int]) -> float:
        since = time.perf_counter()
        for number, batch in enumerate(DataLoader(_Images(layout, ids), BATCH, num_workers=bench.workers, collate_fn=collate)):
            if isinstance(batch, Packed):
                batch.unpack()
            if number == 0 and len(ids) > BATCH:
                since = time.perf_counter()
        return (time.perf_counter() - since) * len(ids) / max(BATCH, len(ids) - BATCH)

    return time_rounds(bench, layouts, max(1, bench.rounds // 3), lambda _: bench.reads, run, workers=bench.workers)


class _Images(Dataset[Tensor]):
    def __init__(self, layout: Layout, ids: list[int]) -> None:
        self.layout, self.ids = layout, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        rows = self.layout.read(self.ids[index])
        return rows if isinstance(rows, Tensor) else torch.from_numpy(rows)


def forget(files: Sequence[Path]) -> None:
    """Have the system drop what it holds of these files in memory."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _print(title: str, rates: Sequence[Rates], log: Callable[[str], None]) -> None:
    """A line a layout; the first two are what others are compared with."""
    log(f"\n{title}, medians\n{'':36s}{'images/s':>10s}{'of memmap':>11s}{'times .pth':>12s}{'images a round':>16s}")
    for rate in rates:
        log(f"{rate.name:36s}{statistics.median(rate.per_s):10,.0f}{rate.ratio(rates[0]):11.2f}{rate.ratio(rates[1]):12.1f}{rate.images:16,d}")
