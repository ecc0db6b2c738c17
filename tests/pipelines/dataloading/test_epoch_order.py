"""The orders of an epoch: every image once, the same in every process, whatever the number of processes and the step it
begins at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from orders import InOrder

from hdovd.cache import Level, rows
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.common.device import Team
from hdovd.pipelines.dataloading.loader import (
    BLOCK,
    WINDOW,
    Dealing,
    Order,
    Streams,
    block_shuffle,
    plain_shuffle,
    shard_shuffle,
    share_of,
)
from hdovd.pipelines.training.train import batches_of
from hdovd.pipelines.training.training_set import TrainingSet


def _shards(count: int, size: int) -> tuple[range, ...]:
    return tuple(range(start, min(start + size, count)) for start in range(0, count, size))


def _orders(count: int, streams: Streams, seed: int = 1) -> list[Order]:
    return [
        partial(plain_shuffle, count, seed),
        partial(block_shuffle, count, seed, streams),
        partial(shard_shuffle, _shards(count, 100), seed, streams, buffer=64),
    ]


@pytest.mark.parametrize("streams", [Streams(), Streams(3, 16), Streams(8, 5)], ids=str)
@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 5000])
def test_every_index_once(count: int, streams: Streams) -> None:
    for order in _orders(count, streams):
        assert sorted(order(0).tolist()) == list(range(count))


def test_an_epoch_follows_from_seed_and_number() -> None:
    for one, same, other in zip(*(_orders(3000, Streams(2, 8), seed) for seed in (7, 7, 8)), strict=True):
        epochs = [one(epoch).tolist() for epoch in range(3)]
        assert same(2).tolist() == epochs[2]
        assert epochs[0] != epochs[1] != epochs[2]
        assert other(0).tolist() != epochs[0]


def test_it_is_a_shuffle() -> None:
    """Blocks and the images in a window: both in disorder."""
    order = block_shuffle(48 * BLOCK, 0, Streams(), 0)
    assert (np.diff(order) == 1).mean() < 0.01
    windows = order.reshape(-1, WINDOW * BLOCK)
    assert all(len(set(window // BLOCK)) == WINDOW for window in windows)
    assert all(np.ptp(window // BLOCK) > WINDOW for window in windows)  # not neighbours
    assert all(len(set(window[:BLOCK] // BLOCK)) == WINDOW for window in windows)  # mixed from the start


@pytest.mark.parametrize(("workers", "world"), [(3, 1), (2, 2), (1, 4)])
def test_workers_have_blocks_and_shards_of_their_own(workers: int, world: int) -> None:
    """A DataLoader's worker w gets steps w, w + W, ...: it must not decode what another one decodes."""
    batch, streams = 8 * world, workers * world
    for order, size in (
        (partial(block_shuffle, 12 * BLOCK, 2, Streams(streams, 8)), BLOCK),
        (partial(shard_shuffle, _shards(12 * 64, 64), 2, Streams(streams, 8)), 64),
    ):
        read = []
        for rank in range(world):
            dealing = Dealing(order, batch, rank, world)
            read += [
                {index // size for step in range(worker, dealing.steps, workers) for index in dealing.part(0, step)}
                for worker in range(workers)
            ]
        assert sum(map(len, read)) == 12
        assert set.union(*read) == set(range(12))


def test_shards_are_mixed_within_the_buffer_and_read_in_turn() -> None:
    """What is drawn at one time comes from what has been read by then: memory is a buffer's."""
    shards = _shards(5000, 100)
    indices = shard_shuffle(shards, 1, Streams(), 0, buffer=256).tolist()
    read_at = {
        index: at
        for at, index in enumerate(i for s in np.random.default_rng([1, 0]).permutation(50) for i in shards[s])
    }
    assert all(read_at[index] <= at + 256 for at, index in enumerate(indices))
    assert np.mean([abs(read_at[index] - at) for at, index in enumerate(indices)]) > 50


@pytest.mark.parametrize("streams", [2, 3, 5, 7])
def test_streams_have_equal_shares(streams: int) -> None:
    shards = _shards(23, 5)
    counts = [len(share_of(shards, stream, streams)) for stream in range(streams)]
    assert sum(counts) == 23
    assert max(counts) - min(counts) <= (2 if streams == 5 else 1)  # a shard each, and the last one holds 3


# --- dealing ---


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_part_every_step_evenly_in_order(world: int) -> None:
    alone = Dealing(partial(plain_shuffle, 37, 3), 8)
    together = [Dealing(partial(plain_shuffle, 37, 3), 8, rank, world) for rank in range(world)]
    assert {dealing.steps for dealing in together} == {alone.steps} == {4}
    for epoch in (0, 1, 0):
        for step in range(4):
            parts = [dealing.part(epoch, step) for dealing in together]
            assert {len(part) for part in parts} == {8 // world}
            assert [index for part in parts for index in part] == alone.part(epoch, step)


def test_a_small_set_is_one_batch() -> None:
    assert Dealing(InOrder(5), 8).part(0, 0) == [0, 1, 2, 3, 4]
    assert Dealing(InOrder(5), 8).steps == 1


def test_a_batch_that_cannot_be_parted_is_refused() -> None:
    with pytest.raises(
        HdovdError, match=r"batch of 8 images cannot be parted among 3 processes: set train\.batch_size.*multiple of 3"
    ):
        Dealing(InOrder(100), 8, 0, 3)


# --- which one training takes ---


def test_the_cache_says_when_blocks_are_better(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not FeatureCache(cache).reads_best_in_blocks  # mapped
    assert not FeatureCache(cache, mapped=False).reads_best_in_blocks  # all of it is kept
    opened = FeatureCache(cache, mapped=False)
    opened.hold(Level.INSTANCE)
    held = opened._instances
    assert not held.mapped
    monkeypatch.setattr(held, "_most", 0)
    assert opened.reads_best_in_blocks


def test_training_takes_it_where_blocks_are_better(
    cache: Path, world: Path, micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = micro_recipe()
    split = DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True)
    data = TrainingSet(split, FeatureCache(cache, mapped=False), recipe)
    alone = Team(0, 1, torch.device("cpu"))
    plain, _ = batches_of(data, alone)
    monkeypatch.setattr(rows.Rows, "reads_best_in_blocks", True)
    blocks, layout = batches_of(data, alone)
    assert len(plain) == len(blocks)
    assert (layout["streams"], layout["unit"], layout["images"]) == (1, recipe.train.batch_size, len(data))
    with pytest.raises(HdovdError, match="another order than the run began with: go on with the same form and place"):
        batches_of(data, alone, layout | {"order": "of shards"})
    wanted = block_shuffle(len(data), recipe.train.seed, Streams(1, recipe.train.batch_size), 0).tolist()
    found = [image_id for batch in blocks for _, _, image_id in batch]
    assert found == [data.images[number].id for number in wanted[: len(found)]]
    assert plain.dealing.order(0).tolist() == plain_shuffle(len(data), recipe.train.seed, 0).tolist()
