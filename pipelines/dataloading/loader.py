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
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hdovd.cache.tar_shards import RawSample, TarShards
from hdovd.core.errors import HdovdError
from hdovd.pipelines.dataloading.sampler import Dealing, Draw

ALIGNMENT = 64  # bytes: a cache line, and a multiple of the size of every dtype that torch has
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Packed(Generic[Batch]):
    """`buffer`: uint8. `sizes`: bytes of the tensors and arrays in it, in order, each from the next multiple of
    ALIGNMENT on. `rest`: the batch, pickled without them.
    """

    buffer: Tensor
    sizes: list[int]
    rest: bytes

    def unpack(self) -> Batch:
        """The batch. Its tensors and arrays are views that keep the whole buffer alive; clone what outlives the
        batch."""
        batch: Batch = pickle.loads(self.rest, buffers=_parts(self.buffer, self.sizes))
        return batch

    def pin_memory(self) -> "Packed[Batch]":
        """The same in page-locked memory; the DataLoader calls it."""
        return Packed(self.buffer.pin_memory(), self.sizes, self.rest)


def pack(batch: Batch) -> Packed[Batch]:
    """Copy the tensors and arrays of a batch into one buffer.

    The batch is any nesting of what can be pickled. Tensors come back detached and contiguous. Others than plain ones
    (sparse, on a GPU, subclasses, arrays of objects) are pickled as ever.
    """
    file, found = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=found.append).dump(batch)
    raws = [part.raw() for part in found]
    sizes = [raw.nbytes for raw in raws]
    buffer = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8)
    for place, raw in zip(_parts(buffer, sizes), raws, strict=True):
        place[:] = raw
    return Packed(buffer, sizes, file.getvalue())


class _Pickler(pickle.Pickler):
    """A tensor goes as an array of its bytes, which as all arrays lies in a buffer of its own."""

    def reducer_override(self, value: Any) -> Any:
        if (
            type(value) is np.ndarray and not value.flags.forc
        ):  # numpy would pickle it within, in the machine's byte order
            return np.ascontiguousarray(value).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if (
            type(value) is not Tensor
            or value.device.type != "cpu"
            or value.layout != torch.strided
            or value.is_quantized
        ):
            return NotImplemented
        rows = value.detach().resolve_conj().resolve_neg().contiguous()
        flat = rows.as_strided((rows.numel(),), (1,))  # of one number or none, any stride counts as contiguous
        return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, value.shape)


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(raw).view(dtype).view(shape)


def _parts(buffer: Tensor, sizes: list[int]) -> Iterator[memoryview]:
    """What lies in a buffer, in order."""
    view, start = buffer.numpy().data, 0
    for size in sizes:
        yield view[start : start + size]
        start += _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


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
