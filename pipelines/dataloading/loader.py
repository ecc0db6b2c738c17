"""Batches of samples from a data set, with worker processes whose errors stay readable."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hdovd.core.errors import HdovdError
from hdovd.pipelines.dataloading.packing import Packed, pack
from hdovd.pipelines.dataloading.sample_keys import Draw
from hdovd.pipelines.dataloading.sampler import Dealing

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

    From workers, the tensors and arrays of a batch are views into one buffer (`packing`), all of it held while one of
    them is.
    """

    def __init__(
        self,
        data: Dataset[Sample],
        batch_size: int,
        workers: int,
        *,
        device: torch.device,
        on_error: Callable[[HdovdError], None] | None = None,
    ) -> None:
        """`on_error`: is told of a sample that cannot be had, which is then left out; without it the error is
        raised."""
        self._on_error = on_error
        self._loader = _loader(data, workers, device, batch_size=batch_size)

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


class TrainingBatches(Batches[Sample]):
    """This process's batches of an epoch, asked of the data set as `Draw`s: of the epoch that `seek` said, from its
    step on.
    """

    def __init__(
        self,
        data: Dataset[Sample],
        dealing: Dealing,
        workers: int,
        *,
        device: torch.device,
        on_error: Callable[[HdovdError], None] | None = None,
    ) -> None:
        self._on_error, self.dealing, self._steps = on_error, dealing, _Steps(dealing)
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
