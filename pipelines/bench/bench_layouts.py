"""The layouts that `bench_cache` compares: the same random features in the cache and in what others use.

Every layout answers the same question: an image id in, a fresh (n, D) float16 array of its own out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import PART_ROWS, Level
from hdovd.cache.writer import ProductWriter
from hdovd.core.errors import HdovdError

PTH_KEY = "proposal_clip_image_embedding"


@dataclass(frozen=True, slots=True)
class CacheBenchConfig:
    """`images` of `rows` rows of `dim` values. `reads`: images of a round; `folder`: an empty one to work in.

    `memory_limit`: bytes, or None.
    """

    folder: Path
    images: int = 20_000
    rows: int = 40
    dim: int = 512
    rounds: int = 15
    reads: int = 4_000
    workers: int = 0
    memory_limit: int | None = None
    part_rows: int = PART_ROWS

    @property
    def offsets(self) -> np.ndarray:
        return np.arange(self.images + 1) * self.rows

    @property
    def ids(self) -> list[int]:
        """Image ids with gaps, as COCO has them."""
        return [7 * number + 1 for number in range(self.images)]


class Layout(ABC):
    """One way to keep features. `name` for the table; `in_blocks`: read in block-shuffled order; `share` of a
    round's reads, less than one where reads are slow."""

    name: str
    in_blocks = False
    share = 1.0

    @abstractmethod
    def read(self, image_id: int) -> np.ndarray | Tensor: ...


class Memmap(Layout):
    """One .npy file, mapped, and the offsets in memory."""

    name = "memory-mapped .npy"

    def __init__(self, bench: CacheBenchConfig) -> None:
        self._rows = np.asarray(np.load(bench.folder / "embedding.npy", mmap_mode="r"))  # no np.memmap: its slices are slow
        self._offset = bench.offsets
        self._row_of = {image_id: row for row, image_id in enumerate(bench.ids)}

    def read(self, image_id: int) -> np.ndarray:
        row = self._row_of[image_id]
        return self._rows[self._offset[row] : self._offset[row + 1]].copy()


class Pth(Layout):
    """One .pth file an image, as published feature files are."""

    name = ".pth an image"
    share = 0.1

    def __init__(self, bench: CacheBenchConfig) -> None:
        self._folder = bench.folder / "pth"

    def read(self, image_id: int) -> Tensor:
        tensor: Tensor = torch.load(f"{self._folder}/{image_id:012d}.pth", weights_only=True)[PTH_KEY]
        return tensor


class Safetensors(Layout):
    """One safetensors file, a tensor an image."""

    name = "safetensors"
    share = 0.5

    def __init__(self, bench: CacheBenchConfig) -> None:
        self._file = safe_open(bench.folder / "all.safetensors", "np")

    def read(self, image_id: int) -> np.ndarray:
        rows: np.ndarray = self._file.get_tensor(str(image_id))
        return rows


class Ours(Layout):
    """The cache through its public reader."""

    def __init__(self, bench: CacheBenchConfig, name: str, *, mapped: bool, in_blocks: bool = False, share: float = 1.0) -> None:
        self.name, self.in_blocks, self.share = name, in_blocks, share
        self.read = FeatureCache(bench.folder / "cache", mapped=mapped).instance_embeddings  # type: ignore[method-assign]

    def read(self, image_id: int) -> np.ndarray:
        raise NotImplementedError


class Nothing(Layout):
    """No reading at all: what the rest of the way costs."""

    name = "nothing read"

    def __init__(self, bench: CacheBenchConfig) -> None:
        self._rows = np.zeros((bench.rows, bench.dim), np.float16)

    def read(self, image_id: int) -> np.ndarray:
        return self._rows


def make_layouts(bench: CacheBenchConfig) -> None:
    """The same random normalised features in every layout."""
    folder, rng, offset = bench.folder, np.random.default_rng(0), bench.offsets
    total = int(offset[-1])
    rows = np.lib.format.open_memmap(folder / "embedding.npy", "w+", np.float16, (total, bench.dim))
    for start in range(0, total, PART_ROWS):
        block = rng.standard_normal((min(PART_ROWS, total - start), bench.dim), np.float32)
        rows[start : start + PART_ROWS] = block / np.linalg.norm(block, axis=1, keepdims=True)
    catalog = Catalog.create(folder / "cache")
    writer = ProductWriter.begin(
        catalog.folder, Level.INSTANCE, {"made_up": True}, rows=total, part_rows=bench.part_rows, dim=bench.dim,
        tables={"image_id": np.array(bench.ids), "image_hash": np.zeros(bench.images, np.uint64), "offset": offset,
                "box": np.zeros((total, 4), np.float32)})
    for part in range(writer.product.parts):
        start, stop = writer.product.rows_of(part)
        writer.write_part(part, {"embedding": rows[start:stop]})
    catalog.write_set("default", FeatureSet({Level.INSTANCE: writer.product.key}))
    (folder / "pth").mkdir()
    tensors = {}
    for row, image_id in enumerate(bench.ids):
        mine = tensors[str(image_id)] = np.asarray(rows[offset[row] : offset[row + 1]])
        torch.save({PTH_KEY: torch.from_numpy(mine.copy())}, folder / "pth" / f"{image_id:012d}.pth")
    save_file(tensors, folder / "all.safetensors")


def open_layouts(bench: CacheBenchConfig) -> list[Layout]:
    """All layouts, memmap and .pth first: ratios are to these."""
    return [Memmap(bench), Pth(bench), Safetensors(bench), Ours(bench, "cache, mapped", mapped=True),
            Ours(bench, "cache through Zarr, block-shuffled", mapped=False, in_blocks=True),
            Ours(bench, "cache through Zarr, random order", mapped=False, share=0.02)]


def check_same(bench: CacheBenchConfig, layouts: Sequence[Layout], ids: Sequence[int]) -> None:
    """Raises HdovdError if a layout answers otherwise than the first."""
    for image_id in ids:
        expected = np.asarray(layouts[0].read(image_id))
        for layout in layouts[1:]:
            found = np.asarray(layout.read(image_id))
            if found.dtype != np.float16 or found.shape != (bench.rows, bench.dim) or not np.array_equal(found, expected):
                raise HdovdError(f"{layout.name} gives other rows for image {image_id} than {layouts[0].name}: a bug, please report it")
