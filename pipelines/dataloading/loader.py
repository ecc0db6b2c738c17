"""Batches of samples from a data set, with worker processes whose errors stay readable; and samples of tar shards in
any order, from streams that only go forward.

A batch has all its tensors and arrays in one buffer: one shared-memory segment, one file descriptor and one message
from a DataLoader worker. Everything else of it is pickled, as it would be on its way out of a worker anyway.
"""

import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hdovd.cache.tar_shards import RawSample, TarShards
from hdovd.core.errors import HdovdError
from hdovd.pipelines.dataloading.sampler import Dealing, Draw

ALIGNMENT = 64  # bytes: a cache line, and a multiple of the size of every dtype that torch has
Batch = TypeVar("Batch")


class Place(NamedTuple):
    """Where a tensor or (by its dtype) an array lies: contiguous from `offset`, a multiple of `ALIGNMENT` bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | np.dtype[Any]

    def view(self, buffer: Tensor) -> Any:
        """The tensor or array in `buffer`, without a copy."""
        if isinstance(self.dtype, torch.dtype):
            # Not a slice of the buffer: slices share one version counter, and autograd would take a change of one for
            # one of all. And of the buffer's own storage: torch waits for copies to a GPU from pinned memory by that.
            number = self.offset // self.dtype.itemsize
            return torch.empty(0, dtype=self.dtype).set_(
                buffer.untyped_storage(), number, self.shape, ()
            )  # no strides: contiguous
        return np.ndarray(self.shape, self.dtype, buffer.numpy().data, self.offset)


@dataclass(frozen=True, slots=True)
class Packed(Generic[Batch]):
    """`buffer`: uint8. `places`: what lies in it, in order. `rest`: the batch, pickled, with numbers of places in
    it."""

    buffer: Tensor
    places: list[Place]
    rest: bytes

    def unpack(self) -> Batch:
        """The batch. Its tensors and arrays are views that keep the whole buffer alive; clone what outlives the
        batch."""
        batch: Batch = _Unpickler(self).load()
        return batch

    def pin_memory(self) -> "Packed[Batch]":
        """The same in page-locked memory; the DataLoader calls it."""
        return Packed(self.buffer.pin_memory(), self.places, self.rest)


def pack(batch: Batch) -> Packed[Batch]:
    """Copy the tensors and arrays of a batch into one buffer.

    The batch is any nesting of what can be pickled. Tensors come back detached and contiguous, and one that occurs
    twice comes back as two. Others than plain ones (sparse, on a GPU, subclasses, arrays of objects) are pickled as
    ever.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    buffer = torch.empty(pickler.size, dtype=torch.uint8)
    for place, source in zip(pickler.places, pickler.sources, strict=True):
        if isinstance(source, Tensor):
            place.view(buffer).copy_(source.detach())
        else:
            place.view(buffer)[...] = source
    return Packed(buffer, pickler.places, file.getvalue())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.size = 0
        self.places: list[Place] = []
        self.sources: list[Tensor | np.ndarray] = []

    def persistent_id(self, value: Any) -> int | None:
        if not _is_plain(value):
            return None
        self.places.append(Place(self.size, tuple(value.shape), value.dtype))
        self.sources.append(value)
        self.size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        return len(self.places) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed[Any]) -> None:
        super().__init__(io.BytesIO(packed.rest))
        self._packed = packed

    def persistent_load(self, number: int) -> Any:
        return self._packed.places[number].view(self._packed.buffer)


def _is_plain(value: Any) -> bool:
    if type(value) is Tensor:
        return value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
    return type(value) is np.ndarray and not value.dtype.hasobject


Sample = TypeVar("Sample")


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


class _Steps(Sampler[list[Draw]]):
    """This process's part of the steps of an epoch, from a step on."""

    def __init__(self, dealing: Dealing) -> None:
        self.dealing, self.epoch, self.first = dealing, 0, 0

    def __len__(self) -> int:
        return self.dealing.steps - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        for step in range(self.first, self.dealing.steps):
            yield [Draw(epoch, step, index) for index in self.dealing.part(epoch, step)]


class Batches(Generic[Sample]):
    """Lists of the samples of a data set, in order.

    From workers, the tensors and arrays of a batch are views into one buffer (`pack`), all of it held while one of
    them is.
    """

    def __init__(self, data: Dataset[Sample], batch_size: int, workers: int, *, device: torch.device) -> None:
        self._loader = _loader(data, workers, device, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Raises HdovdError for a sample that cannot be had."""
        for loaded in self._loader:
            batch = loaded.unpack() if isinstance(loaded, Packed) else loaded
            for sample in batch:
                if isinstance(sample, HdovdError):
                    raise sample
            yield batch


class TrainingBatches(Batches[Sample]):
    """This process's batches of an epoch, asked of the data set as `Draw`s: of the epoch that `seek` said, from its
    step on.
    """

    def __init__(self, data: Dataset[Sample], dealing: Dealing, workers: int, *, device: torch.device) -> None:
        self.dealing, self._steps = dealing, _Steps(dealing)
        self._loader = _loader(data, workers, device, batch_sampler=self._steps)

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.dealing.steps

    def seek(self, epoch: int, step: int = 0) -> None:
        """What the next iteration begins with; both from 0."""
        self._steps.epoch, self._steps.first = epoch, step


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
