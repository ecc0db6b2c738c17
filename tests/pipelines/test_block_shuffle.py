"""The block-shuffled order: every image once, near in the cache when near in time, apart for each worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hdovd.cache import rows
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.coco import DataPaths
from hdovd.config import Recipe
from hdovd.pipelines.block_shuffle import BLOCK, WINDOW, BlockShuffle
from hdovd.pipelines.train import batches_of
from hdovd.pipelines.training_set import TrainingSet
from hdovd.protocol import load_protocol


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 5000])
def test_every_index_once(count: int, workers: int) -> None:
    order = BlockShuffle(count, seed=1, workers=workers, batch_size=16)
    assert sorted(order) == list(range(count))
    assert len(order) == count


def test_an_epoch_follows_from_seed_and_number() -> None:
    first, second = BlockShuffle(3000, seed=7), BlockShuffle(3000, seed=7)
    epochs = [list(first) for _ in range(3)]
    assert [list(second) for _ in range(3)] == epochs
    assert epochs[0] != epochs[1] != epochs[2]
    second.epoch = 1
    assert list(second) == epochs[1]
    assert list(BlockShuffle(3000, seed=8)) != epochs[0]


def test_it_is_a_shuffle() -> None:
    """Blocks and the images in a window: both in disorder."""
    order = np.array(list(BlockShuffle(48 * BLOCK, seed=0)))
    assert (np.diff(order) == 1).mean() < 0.01
    windows = order.reshape(-1, WINDOW * BLOCK)
    assert all(len(set(window // BLOCK)) == WINDOW for window in windows)
    assert all(np.ptp(window // BLOCK) > WINDOW for window in windows)  # not neighbours
    assert all(len(set(window[:BLOCK] // BLOCK)) == WINDOW for window in windows)  # mixed from the start


def test_workers_have_blocks_of_their_own() -> None:
    """A DataLoader's worker w gets batches w, w + W, ...: it must not decode what another one decodes."""
    workers, batch = 3, 8
    order = list(BlockShuffle(12 * BLOCK, seed=2, workers=workers, batch_size=batch))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    blocks = [{index // BLOCK for b in batches[worker::workers] for index in b} for worker in range(workers)]
    assert sum(map(len, blocks)) == 12
    assert set.union(*blocks) == set(range(12))


def test_the_cache_says_when_blocks_are_better(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not FeatureCache(cache).reads_best_in_blocks  # mapped
    assert not FeatureCache(cache, mapped=False).reads_best_in_blocks  # all of it is kept
    opened = FeatureCache(cache, mapped=False)
    opened.hold(Level.INSTANCE)
    held = opened._row_array(Level.INSTANCE, "embedding")
    assert isinstance(held, rows.ZarrRows)
    monkeypatch.setattr(held, "_most", 0)
    assert opened.reads_best_in_blocks


def test_training_takes_it_where_blocks_are_better(cache: Path, world: Path, micro_recipe: Callable[..., Recipe],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = micro_recipe()
    split = DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True, log=lambda _: None)
    data = TrainingSet(split, FeatureCache(cache, mapped=False), recipe, lambda _: None)
    plain = batches_of(data, recipe.train, torch.device("cpu"))
    monkeypatch.setattr(rows.ZarrRows, "reads_best_in_blocks", True)
    blocks = batches_of(data, recipe.train, torch.device("cpu"))
    assert len(plain) == len(blocks)
    wanted = list(BlockShuffle(len(data), recipe.train.seed, batch_size=recipe.train.batch_size))
    found = [image_id for batch in blocks for _, _, image_id in batch]
    assert found == [data.images[number].id for number in wanted[: len(found)]]
    assert found != [image_id for batch in plain for _, _, image_id in batch]
