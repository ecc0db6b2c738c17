"""Batches of samples from a data set, with worker processes whose errors stay readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler

from hdovd.errors import HdovdError
from hdovd.pipelines.packing import Packed, pack

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


class _GuardedStream(IterableDataset[Any]):
    """The same for a stream, which ends with the error. Without a length: the loader would take it for a worker's own."""

    def __init__(self, data: IterableDataset[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.data
        except HdovdError as error:
            yield error


class Batches(Generic[Sample]):
    """Lists of samples: in order, or shuffled by a seed (anew every epoch, and then without a last batch that is not full).

    From workers, the tensors and arrays of a batch are views into one buffer (`packing`), all of it held while one of them is.
    """

    def __init__(self, data: Dataset[Sample], batch_size: int, workers: int, *, device: torch.device,
                 shuffle_seed: int | None = None, sampler: Sampler[int] | None = None,
                 on_error: Callable[[HdovdError], None] | None = None) -> None:
        """`sampler`: the order, in place of a plain shuffle; the rest of what `shuffle_seed` means, it still means.

        `on_error`: is told of a sample that cannot be had, which is then left out; without it the error is raised.
        """
        self._on_error = on_error
        if sampler is None:
            sampler = SequentialSampler(data) if shuffle_seed is None else _shuffled(data, shuffle_seed)  # type: ignore[arg-type]
        # A batch is one file descriptor for as long as it is held, and stages hold a few: the usual limit of 1024 is far off without
        # the sharing strategy "file_system", a setting for the whole process that does not reach spawned workers.
        self._loader = DataLoader(
            _Guarded(data), batch_size, sampler=sampler, collate_fn=pack if workers else list, num_workers=workers,
            generator=None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed),
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
            drop_last=shuffle_seed is not None and len(sampler) >= batch_size)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        return self._loaded()

    def _loaded(self) -> Iterator[list[Sample]]:
        for loaded in self._loader:
            batch = loaded.unpack() if isinstance(loaded, Packed) else loaded
            good = [sample for sample in batch if not isinstance(sample, HdovdError)]
            for error in batch:
                if isinstance(error, HdovdError):
                    if self._on_error is None:
                        raise error
                    self._on_error(error)
            if good:
                yield good


class StreamBatches(Batches[Sample]):
    """Lists of samples from a stream that workers share out among themselves.

    Their order is the stream's; it decides itself whether to shuffle. Workers end at different samples, so what they
    have at hand is cut anew into full batches; the last one that is not full is left out, unless it is the only one or `drop_last` is off.
    """

    def __init__(self, data: IterableDataset[Sample], samples: int, batch_size: int, workers: int, *, device: torch.device, seed: int = 0,
                 drop_last: bool = True) -> None:
        """`samples`: how many an epoch has, of all workers together. `seed`: of the random numbers that workers draw."""
        self._on_error, self._size = None, batch_size
        short = samples % batch_size if not drop_last or samples < batch_size else 0
        self._batches = samples // batch_size + (1 if short else 0)
        self._loader = DataLoader(
            _GuardedStream(data), batch_size, collate_fn=pack if workers else list, num_workers=workers,
            generator=torch.Generator().manual_seed(seed), persistent_workers=workers > 0, pin_memory=device.type == "cuda")

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[Sample]]:
        held: list[Sample] = []
        count = 0
        for some in self._loaded():
            held += some
            while len(held) >= self._size:
                yield held[: self._size]
                held, count = held[self._size :], count + 1
        if held and count < self._batches:
            yield held


def _shuffled(data: Dataset[Any], seed: int) -> Sampler[int]:
    """Every epoch anew. Its generator is not the loader's, from which a loader with workers draws once and one without every epoch."""
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the loader's draw: a seed keeps the order that it had with workers
    return RandomSampler(data, generator=generator)  # type: ignore[arg-type]
