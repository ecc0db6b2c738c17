"""Samples of tar shards in any order, from streams that only go forward: what comes past and is wanted later is kept.

Called by `tar_training`, in each of its workers, once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

from hdovd.cache.tar_sample import RawSample
from hdovd.cache.tar_shards import TarShards

MOST_OPEN = 16  # shards at a time; an order from a shuffle buffer needs two or three


class ShardReading:
    """`wanted`: places in the list of all images that will be taken in this epoch; all others are passed over."""

    def __init__(self, shards: TarShards, epoch: int, wanted: set[int]) -> None:
        self.epoch = epoch
        self._shards, self._wanted = shards, wanted
        self._open: dict[int, Iterator[tuple[int, RawSample]]] = {}  # by number of shard, the one opened first in front
        self._kept: dict[int, RawSample] = {}

    def take(self, place: int) -> RawSample:
        """The sample of a place. Raises HdovdError, naming the shard, if it cannot be read."""
        if place not in self._kept:
            self._wanted.add(place)
            self._advance(place // self._shards.meta.samples, place)
        self._wanted.discard(place)
        return self._kept.pop(place)

    def _advance(self, number: int, place: int | None) -> None:
        """Read shard `number` up to `place`, or to its end. What comes twice was passed over before: it is opened anew."""
        if number not in self._open:
            if len(self._open) == MOST_OPEN:
                self._advance(next(iter(self._open)), None)
            self._open[number] = self._shards.raw(number)
        for at, sample in self._open[number]:
            if at in self._wanted:
                self._kept[at] = sample
            if at == place:
                return
        del self._open[number]
        if place is not None:
            self._advance(number, place)
