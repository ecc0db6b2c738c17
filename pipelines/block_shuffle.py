"""A shuffled order in which images that are read near each other in time lie near each other in the cache.

For caches that cannot be mapped (compressed, or in an object store), of which chunks of a thousand rows are decoded and
some kept: training takes it where `FeatureCache.reads_best_in_blocks` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

BLOCK = 256  # consecutive images
WINDOW = 4  # blocks that are mixed with each other


class BlockShuffle(Sampler[int]):
    """Every index below `count` once: blocks in random order, images in random order within WINDOW blocks at a time.

    The same for the same seed and epoch; each iteration begins the next epoch. `workers` and `batch_size`: as of the
    DataLoader, which deals out batches to its workers in turn: each worker then gets blocks of its own, and no chunk is
    decoded by all of them.
    """

    def __init__(self, count: int, seed: int, *, workers: int = 0, batch_size: int = 1, block: int = BLOCK, window: int = WINDOW) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self._streams, self._batch_size, self._block, self._window = max(1, workers), batch_size, block, window

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        blocks = rng.permutation(-(-self.count // self._block))
        streams = [self._mixed(blocks[start :: self._streams], rng) for start in range(self._streams)]
        while streams:
            for stream in list(streams):
                batch = list(islice(stream, self._batch_size))
                if not batch:
                    streams.remove(stream)
                yield from batch

    def _mixed(self, blocks: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
        """The images of these blocks, a window of blocks after the other."""
        for start in range(0, len(blocks), self._window):
            images = (blocks[start : start + self._window, None] * self._block + np.arange(self._block)).ravel()
            yield from rng.permutation(images[images < self.count]).tolist()
