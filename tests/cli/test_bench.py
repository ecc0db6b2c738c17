"""`hdovd bench` at tiny sizes: it runs, every layout answers alike, and its figures are what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hdovd.cache import rows
from hdovd.cache.catalog import Catalog
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.cli.main import app
from hdovd.core.errors import HdovdError
from hdovd.pipelines.bench import memory_limit
from hdovd.pipelines.bench.bench_cache import Rates, time_reading, time_workers
from hdovd.pipelines.bench.bench_layouts import CacheBenchConfig, Layout, check_same, make_layouts, open_layouts
from hdovd.pipelines.bench.bench_scale import BASE_BOXES, ScaleBenchConfig, ScaleFigures, bench_scale
from hdovd.pipelines.dataloading.packing import pack


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> CacheBenchConfig:
    """Images of 7 rows over parts of 16: some lie in two shards."""
    bench = CacheBenchConfig(tmp_path_factory.mktemp("bench"), images=12, rows=7, dim=8, part_rows=16)
    make_layouts(bench)
    return bench


def test_all_layouts_hold_the_same(bench: CacheBenchConfig) -> None:
    layouts = open_layouts(bench)
    check_same(bench, layouts, bench.ids)
    assert len({layout.name for layout in layouts}) == len(layouts) == 6
    found = np.stack([np.asarray(layouts[0].read(image_id)) for image_id in bench.ids])
    assert len(np.unique(found.reshape(-1, bench.dim), axis=0)) == 12 * 7  # and not all one


def test_every_read_is_an_array_of_its_own(bench: CacheBenchConfig) -> None:
    """Same work for all: a view would win and say nothing."""
    for layout in open_layouts(bench):
        for image_id in (bench.ids[0], bench.ids[2]):  # in one shard, and in two
            before = np.array(layout.read(image_id))
            np.asarray(layout.read(image_id))[:] = 0
            assert np.array_equal(np.asarray(layout.read(image_id)), before), layout.name


def test_a_layout_that_differs_is_named(bench: CacheBenchConfig) -> None:
    class Wrong(Layout):
        name = "wrong one"

        def read(self, image_id: int) -> np.ndarray:
            other = np.array(open_layouts(bench)[0].read(image_id))
            other[-1, -1] += 1
            return other

    with pytest.raises(HdovdError, match="wrong one gives other rows for image 8 than memory-mapped"):
        check_same(bench, [open_layouts(bench)[0], Wrong()], [8])


def test_ratios_are_medians_within_rounds() -> None:
    slow_machine = Rates("a", 10, [100.0, 10.0, 100.0]), Rates("b", 10, [50.0, 5.0, 10.0])
    assert slow_machine[0].ratio(slow_machine[1]) == 2
    assert slow_machine[1].ratio(slow_machine[0]) == 0.5


def test_the_cache_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "cache", "--images", "48", "--rows", "3", "--dim", "16", "--rounds", "2", "--reads", "40",
                                    "--folder", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    read = [line for line in done.stdout.splitlines() if re.search(r"[\d,]+ +\d+\.\d\d +\d+\.\d +\d+$", line)]
    assert [line.split()[-1] for line in read] == ["40", "4", "20", "40", "40", "1"]
    assert re.search(r"memory-mapped \.npy +[\d,]+ +1\.00 ", read[0])
    assert re.search(r"\.pth an image +[\d,]+ +\d\.\d\d +1\.0 ", read[1])
    assert not list(tmp_path.iterdir())


def test_every_read_that_is_timed_is_made(bench: CacheBenchConfig) -> None:
    class Counting(Layout):
        name = "counting"
        share = 0.5

        def read(self, image_id: int) -> np.ndarray:
            read.append(image_id)
            return np.zeros(1, np.float16)

    read: list[int] = []
    few = replace(bench, rounds=3, reads=8)
    (rate,) = time_reading(few, [Counting()])
    assert (rate.images, len(rate.per_s), len(read)) == (4, 3, 12)
    assert all(len(set(read[start : start + 4])) == 4 for start in (0, 4, 8))
    assert set(read) <= set(bench.ids)


@pytest.mark.parametrize("collate", [list, pack])
def test_batches_from_workers(bench: CacheBenchConfig, collate: Callable[[list[Any]], Any]) -> None:
    rates = time_workers(replace(bench, rounds=1, workers=1), [open_layouts(bench)[3]], collate)
    assert [(rate.images, len(rate.per_s)) for rate in rates] == [(12, 1)]
    assert 0 < rates[0].per_s[0] < 1e6


def test_reads_that_ask_ahead_are_the_same(bench: CacheBenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every read had waited for the disk."""
    monkeypatch.setattr(rows, "SLOW_READ_S", -1.0)
    asked = []
    ask = rows.MappedRows._ask_for
    monkeypatch.setattr(rows.MappedRows, "_ask_for", lambda self, *where: asked.append(where) or ask(self, *where))
    check_same(bench, open_layouts(bench), bench.ids)
    assert len(asked) > len(bench.ids)  # those in two shards twice


def test_no_memory_limit_without_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path / "none")
    with pytest.raises(HdovdError, match="memory cannot be limited here"), memory_limit.memory_limit(10**9):
        pass


def test_scale_figures(tmp_path: Path) -> None:
    lines: list[str] = []
    figures = bench_scale(ScaleBenchConfig(tmp_path, images=20, boxes=6, dim=16), lines.append)
    assert figures.rows == 20 + 20 * (BASE_BOXES + 6)
    assert figures.cache_bytes == sum(file.stat().st_size for level in Level for file in (tmp_path / "cache" / level).rglob("*/**/*")
                                      if file.is_file())
    assert 50e6 < figures.main_peak_bytes < 20e9  # torch alone is 200 MB
    cache = FeatureCache(tmp_path / "cache")
    found = np.concatenate([cache.instance_embeddings(image) for image in range(20)])
    assert found.shape == (200, 16)
    assert len(np.unique(found, axis=0)) > 150  # crops differ, and so do their embeddings


def test_peaks_add_up() -> None:
    figures = ScaleFigures(1000, 2.0, main_peak_bytes=10**9, worker_peak_bytes=2 * 10**8, cache_bytes=5 * 10**6, workers=3)
    assert figures.peak_bytes == 16 * 10**8
    assert figures.lines() == ["1,000 rows in 2 s, 500 rows/s", "peak host memory 1.6 GB (main 1.0 GB, 3 workers of 200.0 MB)",
                               "cache 5.0 MB"]


def test_the_scale_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "scale", "--images", "6", "--boxes", "2", "--dim", "8", "--workers", "1",
                                    "--folder", str(tmp_path), "--keep"], catch_exceptions=False)
    assert done.exit_code == 0
    assert re.search(r"^42 rows in \d+ s, [\d,]+ rows/s$", done.stdout, re.M)
    assert re.search(r"^peak host memory [\d.]+ [MG]B \(main [\d.]+ [MG]B, 1 workers of [\d.]+ [MG]B\)$", done.stdout, re.M)
    kept = re.search(r"^kept (.*)$", done.stdout, re.M)
    assert kept is not None
    assert FeatureCache(Path(kept[1]) / "cache").levels() == list(Level)


# --- the speed of extraction ---

def test_the_extract_command(tmp_path: Path, clip: str) -> None:
    words = ["--images", "4", "--boxes", "3", "--picture", "64x48", "--rounds", "2", "--crop-scales", "1,1.5", "--forecast", "100,1000",
             "--json", str(tmp_path / "speed.json"), "--folder", str(tmp_path), "--keep"]
    done = CliRunner().invoke(app, ["bench", "extract", "--clip", clip, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["crops"] == 2 * found["batch_size"]
    assert found["crops"] - found["fill"] == 4 * (2 * 3 + 1)
    assert 0 < found["efficiency"] < 2
    assert found["prepare_a_core"] == pytest.approx(1 / (1 / found["decode_a_core"] + 1 / found["cut_a_core"]))
    real, rest = found["crops"] - found["fill"], found["crops"] / found["end_to_end"] - found["crops"] / found["model_only"]
    assert 1 / found["at_scale"] == pytest.approx(1 / found["model_only"] + max(0, rest) / real)
    assert found["forecast_seconds"] == pytest.approx(2100 / found["at_scale"])
    assert found["transfer"] is found["peak_gpu_bytes"] is None
    for word in ("model only", "end to end", "efficiency", "preparation", "what limits", "a PIL crop a box", "a file a crop", "forecast"):
        assert word in done.stdout
    kept = re.search(r"^kept (.*)$", done.stdout, re.M)
    assert kept is not None
    rows = [product.rows for product in Catalog(Path(kept[1]) / "round 1").products() if product.whole]
    assert sorted(rows) == [4, 12, 12, 65]  # images, boxes, crops, classes


@pytest.mark.parametrize(("option", "text", "message"), [
    ("--picture", "640", "--picture 640: expected two whole numbers"), ("--forecast", "0,5", "--forecast 0,5: expected two"),
    ("--batch", "many", "--batch many: expected auto"), ("--batch", "0", "--batch 0: expected auto"),
    ("--workers", "-1", "--workers -1: expected auto, or a whole number from 0"),
    ("--crop-scales", "big", "--crop-scales big: expected numbers")])
def test_wrong_words(option: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=message):
        CliRunner().invoke(app, ["bench", "extract", option, text, "--folder", str(tmp_path)], catch_exceptions=False)
    assert not any(tmp_path.iterdir())
