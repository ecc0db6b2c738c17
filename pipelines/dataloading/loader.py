"""Batches: in what order a run sees its images, and how samples come from a data set, with worker processes whose
errors stay readable, or from tar shards, which only go forward.

Order, and what is random about an image, are functions of seed, epoch and image id alone. Every place in the list of
images comes once an epoch; `Dealing` cuts an epoch into batches of all processes, and those into each process's part.
A sample depends neither on the number of processes or workers nor on what was drawn before it: a run that is resumed in
mid-epoch, or spread over other GPUs, sees the very same samples.

A batch from a worker has all its tensors in one buffer: one shared-memory segment, one file descriptor and one message.
Everything else of it is pickled, as it would be on its way out of a worker anyway.
"""

import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdovd.cache.tar_shards import RawSample, TarShards
from hdovd.core import HdovdError, counted

Batch = TypeVar("Batch")
Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of one epoch, as batches ask a data set for it: `index` into the data set, `step` of the epoch, both
    from 0.
    """

    epoch: int
    step: int
    index: int


def key_of(seed: int, epoch: int, image_id: int) -> int:
    """A number below 2**63 that seeds all random choices about this image in this epoch."""
    return int.from_bytes(blake2b(f"{seed} {epoch} {image_id}".encode(), digest_size=8).digest()) >> 1


def is_flipped(key: int, probability: float) -> bool:
    """Whether the image is mirrored, by its key."""
    return (key % 2**32) / 2**32 < probability


# --- the order of an epoch ---

BLOCK = 256  # consecutive images
WINDOW = 4  # blocks that are mixed with each other
SHUFFLE_BUFFER = 512  # samples of a stream, of which the next one is drawn: about 100 MB at COCO
Order = Callable[[int], np.ndarray]  # epoch -> (count,) int64: every index once, in every process the same


def plain_shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True, slots=True)
class Streams:
    """Who reads side by side: `count` workers of all processes together, `unit` images each in turn.

    A DataLoader deals out batches to its workers in turn; with as many streams as there are workers, each worker reads
    a stream of its own. A run keeps its streams for good: resumed with other workers, its order is still the same.
    """

    count: int = 1
    unit: int = 1

    def deal(self, streams: Iterable[Iterable[int]]) -> np.ndarray:
        """A unit of each stream in turn, until all are at their end."""
        left, dealt = [iter(stream) for stream in streams], list[int]()
        while left:
            units = [list(islice(stream, self.unit)) for stream in left]
            left = [stream for stream, unit in zip(left, units, strict=True) if len(unit) == self.unit]
            dealt += [index for unit in units for index in unit]
        return np.array(dealt, np.int64)


def block_shuffle(count: int, seed: int, streams: Streams, epoch: int) -> np.ndarray:
    """Blocks in random order, images in random order within WINDOW blocks at a time.

    For caches that cannot be mapped (compressed, or in an object store), of which chunks of a thousand rows are decoded
    and some kept: images that are read near each other in time lie near each other in the cache, and no chunk is
    decoded by all workers. Training takes it where `FeatureCache.reads_best_in_blocks` says so.
    """
    rng = np.random.default_rng([seed, epoch])
    blocks = rng.permutation(-(-count // BLOCK))

    def mixed(own: np.ndarray) -> Iterator[int]:
        for start in range(0, len(own), WINDOW):
            images = (own[start : start + WINDOW, None] * BLOCK + np.arange(BLOCK)).ravel()
            yield from rng.permutation(images[images < count]).tolist()

    return streams.deal([mixed(blocks[start :: streams.count]) for start in range(streams.count)])


def shard_shuffle(
    shards: Sequence[range], seed: int, streams: Streams, epoch: int, buffer: int = SHUFFLE_BUFFER
) -> np.ndarray:
    """For tar shards, which are read from first to last: shards in random order, samples through a buffer of each
    stream: each sample in its turn takes a random place of it, and what was there goes out.

    `shards`: the indices of each shard, in its order. Streams have whole shards, as many each; of the shards left over
    every `streams.count`-th sample, so that none is idle meanwhile.
    """
    rng = np.random.default_rng([seed, epoch])
    order = [shards[number] for number in rng.permutation(len(shards))]
    mixed = list[list[int]]()
    for stream in range(streams.count):
        samples = share_of(order, stream, streams.count)
        held, rest, out = samples[:buffer], samples[buffer:], list[int]()
        for sample, place in zip(rest, rng.integers(0, max(1, len(held)), len(rest)).tolist(), strict=True):
            out.append(held[place])
            held[place] = sample
        mixed.append(out + [held[place] for place in rng.permutation(len(held))])
    return streams.deal(mixed)


def share_of(shards: Sequence[range], stream: int, streams: int) -> list[int]:
    """The samples of stream `stream` of `streams`: whole shards, and its part of those left over."""
    whole = len(shards) - len(shards) % streams
    mine = [sample for shard in shards[stream:whole:streams] for sample in shard]
    return mine + [sample for shard in shards[whole:] for sample in shard if sample % streams == stream]


@dataclass
class Dealing:
    """An epoch cut into steps of `batch_size` images of all processes; process `rank` of `world` gets its part of each,
    for `accumulate` micro-batches.

    The images left over at the end are left out of the epoch, unless there is no full batch at all. Raises HdovdError
    if a batch cannot be parted evenly.
    """

    order: Order
    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        self._epoch, self._indices = 0, self.order(0)
        size, parts = min(self.batch_size, len(self._indices)), self.world * self.accumulate
        if size % parts:
            each = f", in train.accumulate = {self.accumulate} micro-batches each" if self.accumulate > 1 else ""
            raise HdovdError(
                f"a batch of {size} images cannot be parted among {counted(self.world, 'process', 'processes')}{each}: "
                f"set train.batch_size, which is that of all of them together, to a multiple of {parts}"
            )

    @property
    def steps(self) -> int:
        """How many steps an epoch has: the same for every process."""
        return max(1, len(self._indices) // self.batch_size)

    def part(self, epoch: int, step: int) -> list[int]:
        """The indices of this process's part of a step."""
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self.order(epoch)
        size = min(self.batch_size, len(self._indices))
        own, start = size // self.world, step * size
        return self._indices[start + self.rank * own : start + (self.rank + 1) * own].tolist()  # type: ignore[no-any-return]


# --- batches in one buffer ---

ALIGNMENT = 64  # bytes: a cache line, and a multiple of the size of every dtype that torch has


Place = tuple[int, torch.Size, torch.dtype]  # of a tensor: contiguous from an offset, a multiple of ALIGNMENT bytes


def _view(buffer: Tensor, place: Place) -> Tensor:
    """The tensor of a place in `buffer`, without a copy. Not a slice of it: slices share one version counter, and
    autograd would take a change of one for one of all. And of the buffer's own storage: torch waits for copies to a GPU
    from pinned memory by that.
    """
    offset, shape, dtype = place
    return torch.empty(0, dtype=dtype).set_(buffer.untyped_storage(), offset // dtype.itemsize, shape, ())  # no strides


@dataclass(frozen=True, slots=True)
class Packed(Generic[Batch]):
    """`buffer`: uint8. `places`: what lies in it, in order. `rest`: the batch, pickled, with numbers of places in
    it."""

    buffer: Tensor
    places: list[Place]
    rest: bytes

    def unpack(self) -> Batch:
        """The batch. Its tensors are views that keep the whole buffer alive; clone what outlives the batch."""
        return cast(Batch, _Unpickler(self).load())

    def pin_memory(self) -> "Packed[Batch]":
        """The same in page-locked memory; the DataLoader calls it."""
        return Packed(self.buffer.pin_memory(), self.places, self.rest)


def pack(batch: Batch) -> Packed[Batch]:
    """Copy the tensors of a batch into one buffer.

    The batch is any nesting of what can be pickled. Tensors come back detached and contiguous, and one that occurs
    twice comes back as two. Others than plain ones (sparse, on a GPU, subclasses) are pickled as ever.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dump(batch)
    buffer = torch.empty(pickler.size, dtype=torch.uint8)
    for place, source in zip(pickler.places, pickler.sources, strict=True):
        _view(buffer, place).copy_(source.detach())
    return Packed(buffer, pickler.places, file.getvalue())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.size, self.places, self.sources = 0, list[Place](), list[Tensor]()

    def persistent_id(self, value: Any) -> int | None:
        if (
            type(value) is not Tensor
            or value.device.type != "cpu"
            or value.layout != torch.strided
            or value.is_quantized
        ):
            return None
        self.places.append((self.size, value.shape, value.dtype))
        self.sources.append(value)
        self.size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        return len(self.places) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed[Any]) -> None:
        super().__init__(io.BytesIO(packed.rest))
        self._packed = packed

    def persistent_load(self, number: int) -> Tensor:
        return _view(self._packed.buffer, self._packed.places[number])


class _Guarded(Dataset[Any]):
    """Hands an HdovdError over as the item: raised in a worker it would arrive with a traceback in its text."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except HdovdError as error:
            return error


class Batches(Generic[Sample]):
    """Lists of the samples of a data set, in order.

    From workers, the tensors of a batch are views into one buffer (`pack`), all of it held while one of them is.
    """

    def __init__(self, data: Dataset[Sample], batch_size: int, workers: int, *, device: torch.device) -> None:
        self._loader = _loader(data, workers, device, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Raises HdovdError for a sample that cannot be had."""
        for loaded in self._loader:
            batch = loaded.unpack() if isinstance(loaded, Packed) else loaded
            if errors := [sample for sample in batch if isinstance(sample, HdovdError)]:
                raise errors[0]
            yield batch


class TrainingBatches(Batches[Sample]):
    """This process's batches of an epoch, asked of the data set as `Draw`s: of the epoch that `seek` said, from its
    step on.
    """

    def __init__(self, data: Dataset[Sample], dealing: Dealing, workers: int, *, device: torch.device) -> None:
        self.dealing, self._draws = dealing, list[list[Draw]]()
        self._loader = _loader(data, workers, device, batch_sampler=self._draws)
        self.seek(0)

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.dealing.steps

    def seek(self, epoch: int, step: int = 0) -> None:
        """What the next iteration begins with; both from 0."""
        self._draws[:] = [
            [Draw(epoch, at, index) for index in self.dealing.part(epoch, at)] for at in range(step, self.dealing.steps)
        ]


def _apart(_: int) -> None:
    """Signals often go to all processes of a group. A worker that died of one would end a run that is about to save
    itself.
    """
    os.setpgid(0, 0)


def _loader(data: Dataset[Any], workers: int, device: torch.device, **batches: Any) -> DataLoader[Any]:
    # A batch is one file descriptor for as long as it is held, and stages hold a few: the usual limit of 1024 is far
    # off without the sharing strategy "file_system", a setting for the whole process that does not reach spawned
    # workers.
    return DataLoader(
        _Guarded(data),
        collate_fn=pack if workers else list,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_apart,
        generator=torch.Generator().manual_seed(0),  # or the loader would draw from the generator that training uses
        pin_memory=device.type == "cuda",
        **batches,
    )


class ShardReading:
    """Samples of tar shards in any order, from streams that only go forward. `wanted`: places in the list of all images
    that will be taken in this epoch; all others are passed over.
    """

    def __init__(self, shards: TarShards, epoch: int, wanted: set[int]) -> None:
        self.epoch, self._shards, self._wanted = epoch, shards, wanted
        self._open: dict[int, Iterator[tuple[int, RawSample]]] = {}  # by number of shard
        self._kept: dict[int, RawSample] = {}

    def take(self, place: int) -> RawSample:
        """The sample of a place. Raises HdovdError, naming the shard, if it cannot be read. What comes twice was passed
        over before: its shard is opened anew.
        """
        self._wanted.add(place)
        while place not in self._kept:
            self._advance(place // self._shards.meta.samples, place)
        self._wanted.discard(place)
        return self._kept.pop(place)

    def _advance(self, number: int, place: int) -> None:
        """Read shard `number` up to `place`; to its end, where some checksums are compared, if nothing behind it is
        wanted.
        """
        if number not in self._open:
            self._open[number] = self._shards.raw(number)
        behind = range(place + 1, self._shards.meta.places_of(number).stop)
        for at, sample in self._open[number]:
            if at in self._wanted:
                self._kept[at] = sample
            if at == place and not self._wanted.isdisjoint(behind):
                return
        del self._open[number]
