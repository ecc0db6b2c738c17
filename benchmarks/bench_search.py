"""Seconds of an exact search over all boxes of a cache, beside a plain float32 matrix product of the same rows in
memory and reading alone; and the memory that it takes.

    python benchmarks/run.py bench_search [--rows 4100000] [--dim 512]

4.1 million rows of 512 values are 4.2 GB on disk, and 8.4 GB in memory for the product: where less is free than that,
as many rows as fit are multiplied, and the seconds are extrapolated, which is said. A ratio is the median of those
within the rounds, since other work on the machine slows whichever is being measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arguments import parsed, workplace

from hdovd.cache import PART_ROWS, Catalog, FeatureSet, Level
from hdovd.cache.reader import FeatureCache
from hdovd.cache.writer import ProductWriter
from hdovd.pipelines.common.console import size
from hdovd.pipelines.search.nearest import BLOCK_ROWS, best_rows

ROWS_PER_IMAGE = 35


@dataclass(frozen=True)
class SearchBench:
    """`rows` of `dim` values; `count`: how many are asked for. `held`: GB that the product's rows may take; 0: half of
    what is free.
    """

    rows: int = 200_000
    dim: int = 512
    count: int = 20
    rounds: int = 3
    held: float = 0.0


def make_cache(folder: Path, bench: SearchBench) -> None:
    """Random rows of norm 1, a few an image."""
    ids = np.arange(-(-bench.rows // ROWS_PER_IMAGE))
    offset = np.minimum(np.arange(len(ids) + 1) * ROWS_PER_IMAGE, bench.rows)
    images: dict[str, np.ndarray] = {"image_id": ids, "image_hash": np.zeros(len(ids), np.uint64), "offset": offset}
    images["box"] = np.tile(np.array([0, 0, 32, 32], np.float32), (bench.rows, 1))
    of_boxes: dict[str, np.ndarray] = {
        "image_size": np.full((len(ids), 2), 64, np.int32),
        "source": np.ones(bench.rows, np.uint8),
        "score": np.ones(bench.rows, np.float32),
        "annotation_id": np.full(bench.rows, -1),
    }
    catalog, levels, rng = Catalog.create(folder), {}, np.random.default_rng(0)
    for level, tables, dim in ((Level.BOXES, images | of_boxes, 0), (Level.INSTANCE, images, bench.dim)):
        writer = ProductWriter.begin(
            catalog.folder, level, {"made_up": level}, rows=bench.rows, part_rows=PART_ROWS, dim=dim, tables=tables
        )
        for part in range(writer.product.parts) if dim else ():
            start, stop = writer.product.rows_of(part)
            block = rng.standard_normal((stop - start, dim), np.float32)
            rows = (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)
            writer.write_part(part, {"embedding": rows})
        levels[level] = writer.product.key
    catalog.write_set("default", FeatureSet(levels))


def rows_in_memory(cache: FeatureCache, bench: SearchBench) -> torch.Tensor:
    """(n, D) float32, the first rows, as many as may be held."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    most = min(bench.rows, int((bench.held * 1e9 or free) / (4 * bench.dim)))
    held = torch.empty(max(most, 1), bench.dim)
    for start, rows in cache.blocks(BLOCK_ROWS):
        if start >= len(held):
            break
        held[start : start + BLOCK_ROWS] = torch.from_numpy(rows.embedding)[: len(held) - start]
    return held


def seconds(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def peak_bytes() -> int:
    """The largest resident set of this process since it was last set back; what is mapped counts."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


def bench_search(bench: SearchBench, folder: Path) -> list[str]:
    """The lines to print."""
    make_cache(folder / "cache", bench)
    cache = FeatureCache(folder / "cache")
    query = np.random.default_rng(1).standard_normal((1, bench.dim), np.float32)
    query /= np.linalg.norm(query)

    def scan() -> np.ndarray:
        best = best_rows(cache, query, bench.count, lambda _, cosines: cosines[:, 0])
        return best.rows

    def read() -> None:
        for _, rows in cache.blocks(BLOCK_ROWS):
            rows.embedding.copy()

    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    first, peak = seconds(scan), peak_bytes()
    held = rows_in_memory(cache, bench)
    column, share = torch.from_numpy(query[0]), len(held) / bench.rows
    rounds = [(seconds(scan), seconds(lambda: held @ column) / share, seconds(read)) for _ in range(bench.rounds)]
    scanned, product, reading = (statistics.median(column) for column in zip(*rounds, strict=True))
    if share == 1 and set(scan().tolist()) != set(torch.topk(held @ column, bench.count).indices.tolist()):
        print("note: the best of the scan are not those of the product, whose rows are not of norm 1 to the last bit")
    extrapolated = "" if share == 1 else f", extrapolated from {len(held):,d} rows, for want of memory"
    return [
        f"{bench.rows:,d} rows of {bench.dim} values, {torch.get_num_threads()} threads",
        f"{scanned:9.3f} s  scan: read, normalise, multiply, keep the best {bench.count}",
        f"{product:9.3f} s  a float32 matrix product of rows in memory{extrapolated}",
        f"{reading:9.3f} s  reading alone",
        f"{first:9.3f} s  the first scan, which compares checksums too",
        f"{statistics.median(a / b for a, b, _ in rounds):9.2f}    scan / product",
        f"peak of the first scan: {size(peak)}, of which {size(before)} were there before",
    ]


def main() -> None:
    bench = parsed(SearchBench, __doc__)
    with workplace() as place:
        print("\n".join(bench_search(bench, place)))


if __name__ == "__main__":
    main()
