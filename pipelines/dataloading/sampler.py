"""In what order a run sees its images, and what is random about each: functions of seed, epoch and image id alone.

Every place in the list of images comes once an epoch; `Dealing` cuts an epoch into batches of all processes, and those
into each process's part. A sample depends neither on the number of processes or workers nor on what was drawn before
it: a run that is resumed in mid-epoch, or spread over other GPUs, sees the very same samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

import numpy as np

from hdovd.core.errors import HdovdError, counted


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of one epoch, as batches ask a data set for it: `index` into the data set, `step` of the epoch, both
    from 0.
    """

    epoch: int
    step: int
    index: int


def as_draw(wanted: Draw | int) -> Draw:
    """A plain index is that of the first epoch."""
    return Draw(0, 0, wanted) if isinstance(wanted, int) else wanted


def key_of(seed: int, epoch: int, image_id: int) -> int:
    """A number below 2**63 that seeds all random choices about this image in this epoch."""
    return int.from_bytes(blake2b(f"{seed} {epoch} {image_id}".encode(), digest_size=8).digest()) >> 1


def is_flipped(key: int, probability: float) -> bool:
    """Whether the image is mirrored, by its key."""
    return (key % 2**32) / 2**32 < probability


BLOCK = 256  # consecutive images
WINDOW = 4  # blocks that are mixed with each other
SHUFFLE_BUFFER = 512  # samples of a stream, of which the next one is drawn: about 100 MB at COCO


class EpochOrder(ABC):
    """Every index below `count` once an epoch."""

    count: int

    @abstractmethod
    def indices(self, epoch: int) -> np.ndarray:
        """(count,) int64, the same for the same epoch in every process."""


@dataclass(frozen=True, slots=True)
class PlainShuffle(EpochOrder):
    count: int
    seed: int

    def indices(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


@dataclass(frozen=True, slots=True)
class Streams:
    """Who reads side by side: `count` workers of all processes together, `unit` images each in turn.

    A DataLoader deals out batches to its workers in turn; with as many streams as there are workers, each worker reads
    a stream of its own. A run keeps its streams for good: resumed with other workers, its order is still the same.
    """

    count: int = 1
    unit: int = 1

    def deal(self, streams: Iterable[Iterable[int]]) -> Iterator[int]:
        """A unit of each stream in turn, until all are at their end."""
        left = [iter(stream) for stream in streams]
        while left:
            for stream in list(left):
                unit = list(islice(stream, self.unit))
                if len(unit) < self.unit:
                    left.remove(stream)
                yield from unit


@dataclass(frozen=True, slots=True)
class BlockShuffle(EpochOrder):
    """Blocks in random order, images in random order within WINDOW blocks at a time.

    For caches that cannot be mapped (compressed, or in an object store), of which chunks of a thousand rows are decoded
    and some kept: images that are read near each other in time lie near each other in the cache, and no chunk is
    decoded by all workers. Training takes it where `FeatureCache.reads_best_in_blocks` says so.
    """

    count: int
    seed: int
    streams: Streams = Streams()

    def indices(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        blocks = rng.permutation(-(-self.count // BLOCK))
        mixed = [self._mixed(blocks[start :: self.streams.count], rng) for start in range(self.streams.count)]
        return np.fromiter(self.streams.deal(mixed), np.int64, self.count)

    def _mixed(self, blocks: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
        """The images of these blocks, a window of blocks after the other."""
        for start in range(0, len(blocks), WINDOW):
            images = (blocks[start : start + WINDOW, None] * BLOCK + np.arange(BLOCK)).ravel()
            yield from rng.permutation(images[images < self.count]).tolist()


@dataclass(frozen=True, slots=True)
class ShardShuffle(EpochOrder):
    """For tar shards, which are read from first to last: shards in random order, samples through a buffer of each
    stream.

    `shards`: the indices of each shard, in its order. Streams have whole shards, as many each; of the shards left over
    every `streams.count`-th sample, so that none is idle meanwhile.
    """

    shards: tuple[range, ...]
    seed: int
    streams: Streams = Streams()
    buffer: int = SHUFFLE_BUFFER

    @property
    def count(self) -> int:  # type: ignore[override]
        return sum(map(len, self.shards))

    def indices(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = [self.shards[number] for number in rng.permutation(len(self.shards))]
        mixed = [self._mixed(share_of(order, stream, self.streams.count), rng) for stream in range(self.streams.count)]
        return np.fromiter(self.streams.deal(mixed), np.int64, self.count)

    def _mixed(self, samples: list[int], rng: np.random.Generator) -> list[int]:
        """Each sample in its turn takes a random place of the buffer, and what was there goes out."""
        held, rest = samples[: self.buffer], samples[self.buffer :]
        mixed = []
        for sample, place in zip(rest, rng.integers(0, max(1, len(held)), len(rest)).tolist(), strict=True):
            mixed.append(held[place])
            held[place] = sample
        return mixed + [held[place] for place in rng.permutation(len(held))]


def share_of(shards: Sequence[range], stream: int, streams: int) -> list[int]:
    """The samples of stream `stream` of `streams`: whole shards, and its part of those left over."""
    whole = len(shards) - len(shards) % streams
    mine = [sample for shard in shards[stream:whole:streams] for sample in shard]
    return mine + [sample for shard in shards[whole:] for sample in shard if sample % streams == stream]


@dataclass(slots=True)
class Dealing:
    """An epoch cut into steps of `batch_size` images of all processes; process `rank` of `world` gets its part of each,
    for `accumulate` micro-batches.

    The images left over at the end are left out of the epoch, unless there is no full batch at all. Raises HdovdError
    if a batch cannot be parted evenly.
    """

    order: EpochOrder
    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    _epoch: int = field(default=-1, init=False)
    _indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), init=False)

    def __post_init__(self) -> None:
        size, parts = min(self.batch_size, self.order.count), self.world * self.accumulate
        if size % parts:
            each = f", in train.accumulate = {self.accumulate} micro-batches each" if self.accumulate > 1 else ""
            raise HdovdError(
                f"a batch of {size} images cannot be parted among {counted(self.world, 'process', 'processes')}{each}: "
                f"set train.batch_size, which is that of all of them together, to a multiple of {parts}"
            )

    @property
    def steps(self) -> int:
        """How many steps an epoch has: the same for every process."""
        return max(1, self.order.count // self.batch_size)

    def part(self, epoch: int, step: int) -> list[int]:
        """The indices of this process's part of a step."""
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self.order.indices(epoch)
        size = min(self.batch_size, self.order.count)
        own, start = size // self.world, step * size
        return self._indices[start + self.rank * own : start + (self.rank + 1) * own].tolist()  # type: ignore[no-any-return]
