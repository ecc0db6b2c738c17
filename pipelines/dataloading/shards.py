"""Samples of tar shards in any order, from streams that only go forward: what comes past and is wanted later is
kept."""

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
        self._last: dict[int, int] = {}  # the last place of a shard that was wanted when it was opened
        self._kept: dict[int, RawSample] = {}

    def take(self, place: int) -> RawSample:
        """The sample of a place. Raises HdovdError, naming the shard, if it cannot be read."""
        if place not in self._kept:
            self._wanted.add(place)
            self._advance(place // self._shards.meta.samples, place)
        self._wanted.discard(place)
        return self._kept.pop(place)

    def _advance(self, number: int, place: int | None) -> None:
        """Read shard `number` up to `place`; to its end, where some checksums are compared, if nothing behind it is
        wanted, or `place` is None. What comes twice was passed over before: the shard is opened anew.
        """
        if number not in self._open:
            if len(self._open) == MOST_OPEN:
                self._advance(next(iter(self._open)), None)
            self._open[number] = self._shards.raw(number)
            self._last[number] = max(
                (at for at in self._shards.meta.places_of(number) if at in self._wanted), default=-1
            )
        for at, sample in self._open[number]:
            if at in self._wanted:
                self._kept[at] = sample
            if at == place and at < self._last[number]:
                return
        del self._open[number]
        if place is not None and place not in self._kept:
            self._advance(number, place)
