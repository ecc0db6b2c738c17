"""Batches of samples from a data set, with worker processes whose errors stay readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from hdovd.errors import HdovdError

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


class Batches(Generic[Sample]):
    """Lists of samples: in order, or shuffled by a seed (anew every epoch, and then without a last batch that is not full)."""

    def __init__(self, data: Dataset[Sample], batch_size: int, workers: int, *, device: torch.device,
                 shuffle_seed: int | None = None, on_error: Callable[[HdovdError], None] | None = None) -> None:
        """`on_error`: is told of a sample that cannot be had, which is then left out; without it the error is raised."""
        self._on_error = on_error
        if workers:  # a file descriptor a tensor would run into the usual limit of 1024
            torch.multiprocessing.set_sharing_strategy("file_system")
        shuffle = shuffle_seed is not None
        generator = torch.Generator().manual_seed(shuffle_seed) if shuffle_seed is not None else None
        self._loader = DataLoader(
            _Guarded(data), batch_size, shuffle=shuffle, generator=generator, collate_fn=list, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda",
            drop_last=shuffle and len(data) >= batch_size)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for batch in self._loader:
            good = [sample for sample in batch if not isinstance(sample, HdovdError)]
            for error in batch:
                if isinstance(error, HdovdError):
                    if self._on_error is None:
                        raise error
                    self._on_error(error)
            if good:
                yield good
