"""Batches: the same from any number of workers, in every epoch, and errors that stay readable."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.core import HdovdError
from hdovd.data.targets import Targets
from hdovd.pipelines.dataloading.loader import Batches, Dealing, Draw, TrainingBatches, plain_shuffle

CPU = torch.device("cpu")
Sample = tuple[Tensor, Targets, int]


class _Data(Dataset[Sample]):
    """Sample i holds i everywhere, in shapes that depend on it; `bad` ones raise."""

    def __init__(self, length: int = 11, bad: tuple[int, ...] = (), error: type[Exception] = HdovdError) -> None:
        self.length, self.bad, self.error = length, bad, error

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, wanted: Draw | int) -> Sample:
        index = wanted if isinstance(wanted, int) else wanted.index
        if index in self.bad:
            raise self.error(f"picture {index} cannot be read")
        rows = [torch.full((index % 3, 4), float(index)) for _ in range(6)]
        return (
            torch.full((3, 2, index), index, dtype=torch.uint8),
            Targets(*rows, torch.full((4,), float(index)), torch.arange(4) > index if index % 2 else None),
            index,
        )


def _told(batches: Batches[Any], epochs: int = 1) -> list[list[list[Any]]]:
    """All epochs, in plain lists."""
    return [[[_plain(sample) for sample in batch] for batch in batches] for _ in range(epochs)]


def _plain(sample: Sample) -> Any:
    picture, targets, index = sample
    return [
        picture.shape,
        picture.tolist(),
        *(
            value if value is None else (value.shape, value.tolist())
            for value in map(targets.__getattribute__, Targets.__slots__)
        ),
        index,
    ]


def _ids(batches: Batches[Any]) -> list[list[int]]:
    return [[index for _, _, index in batch] for batch in batches]


def _training(data: Dataset[Any], batch_size: int, workers: int, seed: int = 5) -> TrainingBatches[Any]:
    return TrainingBatches(data, Dealing(partial(plain_shuffle, len(data), seed), batch_size), workers, device=CPU)  # type: ignore[arg-type]


def test_workers_change_nothing_in_any_epoch() -> None:
    for make in (
        lambda workers: Batches(_Data(), 3, workers, device=CPU),
        lambda workers: _training(_Data(), 3, workers),
    ):
        alone, one, two = (_told(make(workers), epochs=3) for workers in (0, 1, 2))
        assert one == alone
        assert two == alone


@pytest.mark.parametrize("workers", [0, 1])
def test_order_and_last_batch(workers: int) -> None:
    assert _ids(Batches(_Data(5), 2, workers, device=CPU)) == [[0, 1], [2, 3], [4]]
    shuffled = _ids(_training(_Data(5), 2, workers))
    assert [len(batch) for batch in shuffled] == [2, 2]
    assert _ids(_training(_Data(5), 2, workers)) == shuffled
    assert len(_ids(_training(_Data(5), 8, workers))[0]) == 5  # or there would be none


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_entered_at_any_step(workers: int) -> None:
    batches = _training(_Data(), 2, workers)
    assert len(batches) == 5
    epochs = []
    for epoch in range(3):
        batches.seek(epoch)
        epochs.append(_ids(batches))
    assert epochs[0] != epochs[1]
    again = _training(_Data(), 2, workers)
    for epoch, step in ((1, 3), (2, 0), (0, 4)):
        again.seek(epoch, step)
        assert _ids(again) == epochs[epoch][step:]
        assert len(again) == 5  # of a whole epoch


def test_loading_leaves_the_generator_of_training_alone() -> None:
    before = torch.get_rng_state()
    for workers in (0, 1):
        _ids(_training(_Data(), 2, workers))
        _ids(Batches(_Data(), 2, workers, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_error_arrives_as_itself(workers: int) -> None:
    with pytest.raises(HdovdError) as error:
        _ids(Batches(_Data(bad=(4,)), 3, workers, device=CPU))
    assert str(error.value) == "picture 4 cannot be read"


def test_any_other_error_of_a_worker_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)worker process 0.*in __getitem__.*picture 4 cannot be read"):
        _ids(Batches(_Data(bad=(4,), error=ZeroDivisionError), 3, 1, device=CPU))


def test_sample_that_cannot_be_sent_is_an_error() -> None:
    """Pickled in the worker's loop; by the thread of its queue, the main process would wait for ever."""
    with pytest.raises(Exception, match=r"(?s)worker process 0.*pickle"):
        list(Batches([torch.ones(1), lambda: None], 2, 1, device=CPU))  # type: ignore[arg-type]


# Samples in a list: a spawned process need not find the classes of this file.
FROM_SPAWNED_WORKERS = """
import torch
from hdovd.core import HdovdError
from hdovd.pipelines.dataloading.loader import Batches, Dealing, Draw, TrainingBatches, plain_shuffle
from hdovd.data.targets import Targets
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    data = [(torch.full((3, 2, i), i), Targets(*(torch.full((2, 4), i) for _ in range(7))), i) for i in range(1, 6)]
    batches, found = Batches([*data, *data[:1], HdovdError("bad picture")], 2, 1, device=torch.device("cpu")), []
    try:
        for batch in batches:
            found += batch
    except HdovdError as error:
        print(error)
    assert found.pop()[2] == 1
    assert [i for *_, i in found] == [1, 2, 3, 4, 5]
    assert all(bool((p == i).all()) and p.shape == (3, 2, i) and bool((t.pseudo_texts == i).all()) for p, t, i in found)
"""

# 128 tensors a batch; the batch before and the one at hand are held.
UNDER_64_DESCRIPTORS = """
import resource
import torch
from hdovd.pipelines.dataloading.loader import Batches, Dealing, Draw, TrainingBatches, plain_shuffle
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    data = [[torch.full((5,), i) for _ in range(8)] for i in range(1600)]
    batches = Batches(torch.utils.data.StackDataset(*map(list, zip(*data))), 16, 2, device=torch.device("cpu"))
    before = None
    for number, batch in enumerate(batches):
        assert [int(rows[0][0]) for rows in batch] == list(range(16 * number, 16 * number + 16))
        before = batch
    print(number + 1, torch.multiprocessing.get_sharing_strategy())
"""


@pytest.mark.parametrize(
    ("script", "says"),
    [(FROM_SPAWNED_WORKERS, "bad picture"), (UNDER_64_DESCRIPTORS, "100 file_descriptor")],
    ids=["spawned workers", "64 descriptors"],
)
def test_in_a_process_of_its_own(script: str, says: str, tmp_path: Any) -> None:
    (tmp_path / "main.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == says
