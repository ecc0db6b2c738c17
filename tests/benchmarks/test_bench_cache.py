"""Layouts of the same features: all answer alike, every read that is timed is made, and the command prints what it
measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import memory_limit
import numpy as np
import pytest
from bench_cache import (
    CacheBench,
    Layout,
    bench_cache,
    by_workers,
    check_same,
    here,
    make_layouts,
    open_layouts,
    rates,
    table,
)

from hdovd.pipelines.dataloading.loader import pack

BENCH = CacheBench(images=12, rows=7, dim=8, part_rows=16)  # images of 7 rows over parts of 16: some lie in two shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    make_layouts(made, BENCH)
    return made


def test_all_layouts_hold_the_same(folder: Path) -> None:
    layouts = open_layouts(folder, BENCH)
    check_same(layouts, BENCH.ids)
    assert len({layout.name for layout in layouts}) == len(layouts) == 6
    found = np.concatenate([layouts[0].read(image) for image in BENCH.ids])
    assert len(np.unique(found, axis=0)) == 12 * 7  # and not all one


def test_every_read_is_an_array_of_its_own(folder: Path) -> None:
    """Same work for all: a view would win and say nothing."""
    for layout in open_layouts(folder, BENCH):
        for image in (BENCH.ids[0], BENCH.ids[2]):  # in one shard, and in two
            before = layout.read(image).copy()
            layout.read(image)[:] = 0
            assert np.array_equal(layout.read(image), before), layout.name


def test_a_layout_that_differs_is_named(folder: Path) -> None:
    first = open_layouts(folder, BENCH)[0]
    with pytest.raises(SystemExit, match="wrong one gives other rows for image 8 than memory-mapped"):
        check_same([first, Layout("wrong one", lambda image: first.read(image) + 1)], [8])


def test_every_read_that_is_timed_is_made() -> None:
    read: list[int] = []
    found = rates(replace(BENCH, reads=8), [Layout("counting", read.append, 0.5)], here, rounds=3)
    assert (len(found["counting"]), len(read)) == (3, 12)
    assert all(len(set(read[start : start + 4])) == 4 for start in (0, 4, 8))
    assert set(read) <= set(BENCH.ids)


def test_ratios_are_medians_within_rounds() -> None:
    lines = table("title", {"a": [100.0, 10.0, 100.0], "b": [50.0, 5.0, 10.0]})
    assert [line.split()[2:] for line in lines[2:]] == [["1.00", "2.0"], ["0.50", "1.0"]]


@pytest.mark.parametrize("collate", [list, pack])
def test_batches_from_workers(folder: Path, collate: Callable[[list[Any]], Any]) -> None:
    assert 0 < by_workers(open_layouts(folder, BENCH)[3], BENCH.ids, 1, collate) < 60


def test_no_memory_limit_without_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "none")
    with pytest.raises(SystemExit, match="memory cannot be limited here"), memory_limit.memory_limit(10**9):
        pass


def test_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_cache(tmp_path, CacheBench(images=48, rows=3, dim=16, rounds=2, reads=40))
    said = capsys.readouterr().out
    assert len(re.findall(r"[\d,]+ +\d+\.\d\d +\d+\.\d$", said, re.M)) == 6
    assert re.search(r"memory-mapped \.npy +[\d,]+ +1\.00 ", said)
    assert re.search(r"\.pth an image +[\d,]+ +\d\.\d\d +1\.0$", said, re.M)
