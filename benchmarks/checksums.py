"""What comparing checksums costs: `python benchmarks/checksums.py`.

The first epoch over a cache in memory with and without, in turn, in random order and one process: the ratio of their
times. Then the seconds to write and to read weights, with their checksum and without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arguments import parsed, workplace
from bench_cache import CacheBench, make_layouts
from safetensors.torch import load_file, save_file

from hdovd.cache.reader import FeatureCache
from hdovd.pipelines.common.tensors import load_tensors, save_tensors

PICTURE_S = 0.005  # to decode one and lay it out: the least that an image costs besides


@dataclass(frozen=True)
class ChecksumBench:
    """`weights`: tensors of 100 MB."""

    images: int = 10_000
    weights: int = 7
    rounds: int = 7


def main(folder: Path, asked: ChecksumBench) -> None:
    bench = CacheBench(images=asked.images)
    make_layouts(folder, bench)
    order = np.random.default_rng(0).permutation(bench.ids).tolist()

    def epoch(*, checked: bool) -> float:
        read, since = FeatureCache(folder / "cache", checked=checked).instance_embeddings, time.perf_counter()
        for image in order:
            read(image)
        return time.perf_counter() - since

    epoch(checked=True)
    with_it, without = zip(*((epoch(checked=True), epoch(checked=False)) for _ in range(asked.rounds)), strict=True)
    ratio = statistics.median(a / b for a, b in zip(with_it, without, strict=True))
    extra = statistics.median(a - b for a, b in zip(with_it, without, strict=True))
    size = 2 * bench.images * bench.rows * bench.dim / 1e9
    print(
        f"first epoch over {size:.2f} GB of rows: {ratio:.2f} times as long with checksums, {extra / size:.2f} s/GB, "
        f"once; "
        f"{1 + extra / (PICTURE_S * bench.images):.3f} times where each image takes {PICTURE_S * 1000:.0f} ms besides"
    )
    state, file = {str(k): torch.randn(25_000_000) for k in range(asked.weights)}, folder / "weights.safetensors"
    for what, plain, checked in (
        ("write", lambda: save_file(state, file), lambda: save_tensors(state, file)),
        ("read", lambda: load_file(file), lambda: load_tensors(file)),
    ):
        print(
            f"{what} weights of {asked.weights * 100} MB: {_seconds(plain):.2f} s, with their checksum "
            f"{_seconds(checked):.2f} s"
        )


def _seconds(call: Callable[[], object]) -> float:
    call()
    since = time.perf_counter()
    call()
    return time.perf_counter() - since


if __name__ == "__main__":
    with workplace() as place:
        main(place, parsed(ChecksumBench, __doc__))
