"""A batch with all its tensors and arrays in one buffer: one shared-memory segment and one message from a DataLoader
worker.

Everything else of the batch is pickled, as it would be on its way out of a worker anyway, with a note in place of each
tensor and array that says where it lies.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and a multiple of the size of every dtype that torch has
Batch = TypeVar("Batch")


class Place(NamedTuple):
    """Where a tensor or (by its dtype) a numpy array lies: contiguous from `offset`, a multiple of `ALIGNMENT`
    bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | np.dtype[Any]

    def view(self, buffer: Tensor) -> Any:
        """The tensor or array in `buffer`, without a copy."""
        if isinstance(self.dtype, torch.dtype):
            # Not a slice of the buffer: slices share one version counter, and autograd would take a change of one for
            # one of all.
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
