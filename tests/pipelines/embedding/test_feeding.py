"""Ordered answers from threads: bounded look-ahead, errors that arrive, and torch's threads as they were."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hdovd.cache import Level
from hdovd.core import HdovdError, lines_to
from hdovd.data import ImageBoxes
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.embedding.embedders import Batch, CropJob, Wanted, embed, in_order, own_threads


def test_answers_come_in_order_whatever_takes_how_long() -> None:
    def slow(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        return number * 10

    with own_threads(4) as pool:
        assert list(in_order(pool, slow, range(30), 6)) == [10 * n for n in range(30)]


def test_no_more_is_begun_than_asked_for() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield number

    with own_threads(2) as pool:
        for answered, _ in enumerate(in_order(pool, lambda n: n, items(), 4), 1):
            assert taken <= answered + 3
    assert taken == 100


def test_an_error_arrives_in_its_turn_and_what_waits_is_dropped() -> None:
    begun = []

    def fail(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("number 2")
        return number

    seen = []
    with own_threads(1) as pool, pytest.raises(ValueError, match="number 2"):  # noqa: PT012
        for answer in in_order(pool, fail, range(100), 3):
            seen.append(answer)
    assert seen == [0, 1]
    assert len(begun) <= 6


def test_torch_computes_alone_in_each_thread_and_as_before_elsewhere() -> None:
    before = torch.get_num_threads()
    barrier = threading.Barrier(2)

    def threads(_: int) -> int:
        barrier.wait(10)
        return torch.get_num_threads()

    with own_threads(2) as pool:
        assert list(in_order(pool, threads, range(2), 4)) == [1, 1]
        assert torch.get_num_threads() == before
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *found] == [before, before]


@pytest.mark.parametrize(
    ("device", "asked", "processes", "expected"),
    [
        ("cpu", None, "1", 0),
        ("cpu", 3, "1", 3),
        ("cuda", None, "1", 15),
        ("cuda:2", None, "4", 3),
        ("cuda", None, "16", 1),
        ("cuda", 0, "1", 0),
    ],
)
def test_workers_suit_the_device(
    device: str, asked: int | None, processes: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert workers_for(torch.device(device), asked) == expected


# --- worker processes ---


class _Way:
    """Adds up the pixels of each input. `fit` runs where pictures are cut."""

    level, input_size = Level.IMAGE, (2, 2)

    def __init__(self, fit: Callable[[Tensor], Tensor]) -> None:
        self.fit = fit

    def encode(self, batch: Batch) -> np.ndarray:
        return batch.pixels.flatten(1).sum(dim=1).numpy()


def _corner(picture: Tensor) -> Tensor:
    return picture[:, :2, :2]


def _die(picture: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return picture


def _embed(tmp_path: Path, fit: Callable[[Tensor], Tensor], workers: int) -> list[int]:
    jobs = []
    for number in range(5):
        Image.new("RGB", (3, 3), (number, 0, 0)).save(tmp_path / f"{number}.png")
        image = ImageBoxes(
            number, f"{number}.png", 3, 3, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, np.int64)
        )
        jobs.append(CropJob(image, tmp_path / f"{number}.png"))
    way: Any = _Way(fit)
    wanted = [Wanted(Level.IMAGE, [job], 1, np.zeros(1, np.int64), True) for job in jobs]
    return [int(answer[0][0]) for answer in embed(wanted, {Level.IMAGE: way}, torch.device("cpu"), workers)]


@pytest.mark.parametrize(
    ("free", "workers", "said"), [(10**9, 2, ""), (2 * 12, 2, "room for the batches of 1"), (5, 3, "batches of 0")]
)
def test_workers_are_as_many_as_shared_memory_has_room_for(
    free: int, workers: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    printed = list[str]()
    with lines_to(printed.append):
        assert _embed(tmp_path, _corner, workers) == [0, 4, 8, 12, 16]
    assert said in "".join(printed)
    assert ("--shm-size" in "".join(printed)) == bool(said)


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"(?s)worker.* (exited|killed).*--workers.*--batch.*goes on"):
        _embed(tmp_path, _die, 1)
