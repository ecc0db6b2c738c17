"""Ordered answers from threads: bounded look-ahead, errors that arrive, and torch's threads as they were."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from hdovd.pipelines.device import workers_for
from hdovd.pipelines.feeding import in_order, own_threads


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


@pytest.mark.parametrize(("device", "asked", "processes", "expected"), [
    ("cpu", None, "1", 0), ("cpu", 3, "1", 3), ("cuda", None, "1", 15), ("cuda:2", None, "4", 3), ("cuda", None, "16", 1),
    ("cuda", 0, "1", 0)])
def test_workers_suit_the_device(device: str, asked: int | None, processes: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert workers_for(torch.device(device), asked) == expected
