"""An extraction by many processes: started twice by mistake, in shards that change, by torchrun, Ray and submitit. The
bytes are one process's.

Most scenes are real processes played once (`spread_scenes`). The test of Ray needs `pip install 'hdovd[ray]'`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked_extractions import Child, play
from spread_scenes import SCENES
from torch.distributed.run import main as torchrun

from hdovd.cache import Catalog, Level, Product
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, Share
from hdovd.pipelines.extraction.extract_clip import extract_clip, prepare

Config = Callable[..., ExtractConfig]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _run(words: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def facts(extraction: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(extraction(tmp_path_factory.mktemp("spread")), *SCENES)


@pytest.fixture(scope="module")
def alone(extraction: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process makes, in parts of 16 rows."""
    folder = tmp_path_factory.mktemp("alone") / "cache"
    extract_clip(extraction(folder, part_rows=16, batch_size=16))
    return folder


def _crops(printed: str) -> tuple[int, int]:
    """Pictures and crops that the process made, and that others made, as it says."""
    found = re.search(
        r"is whole, .*; ([\d,]+) pictures and boxes in [^;\n]*(?:; ([\d,]+) by other processes)?", printed
    )
    assert found, printed
    mine, others = (int((number or "0").replace(",", "")) for number in found.groups())
    return mine, others


def test_started_several_times_at_once_all_succeed_and_share_the_work(facts: dict[str, Any]) -> None:
    seen = facts["together"]
    assert seen["codes"] == [0] * 3
    assert seen["same"]
    crops = [_crops(printed) for printed in seen["printed"]]
    assert min(mine for mine, _ in crops) > 0
    assert {mine + others for mine, others in crops} == {sum(mine for mine, _ in crops)}  # nothing was made twice


def test_other_shards_go_on_where_killed_ones_were(facts: dict[str, Any]) -> None:
    seen = facts["elastic"]
    assert seen["2 codes"] == [-9, -9]
    assert seen["3 codes"] == [0, -9, 0]
    assert not seen["2 damaged"] + seen["3 damaged"]
    for printed in (seen["3 printed"][0], seen["3 printed"][2]):
        found = re.search(
            r"this worker is done, it made (\d+) parts; (\d+) of (\d+) are other workers' or missing: when all have "
            r"ended, "
            r"the same command without --shard finishes what is left",
            printed,
        )
        assert found, printed
        made, left, everything = map(int, found.groups())
        assert made > 0
        assert 0 < left < everything - made
        assert "next:" not in printed
    assert seen["code"] == 0
    assert "set default is whole" in seen["printed"]
    assert seen["same"]


def test_of_torchruns_processes_the_first_prints(facts: dict[str, Any]) -> None:
    seen = facts["ranks_and_shards"]["torchrun"]
    assert seen["codes"] == [0, 0]
    assert seen["printed"][1] == ""
    assert seen["printed"][0].count("plan for") == 1
    assert "set default is whole" in seen["printed"][0]  # it waits for the others
    assert seen["same"]


def test_torchrun_in_an_array_shares_each_tasks_shard(facts: dict[str, Any]) -> None:
    seen = facts["ranks_and_shards"]["torchrun in an array"]
    assert seen["codes"] == [0] * 4
    assert [printed == "" for printed in seen["printed"]] == [False, True, False, True]
    assert all("4 processes" in printed for printed in seen["printed"][::2])
    assert seen["same"]


def test_torchrun_itself(alone: Path, extraction: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is forked; what it starts are fresh processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = extraction(tmp_path / "cache")
    words = [
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "hdovd",
        "extract-clip",
        "--data",
        config.data.root,
        "--cache",
        config.cache,
        "--clip",
        config.clip,
        "--proposals",
        config.proposals,
        "--vocabulary",
        config.vocabulary,
        "--captions",
        config.captions,
        "--protocol",
        config.protocol,
        "--device",
        "cpu",
        "--part-rows",
        16,
        "--batch-size",
        16,
    ]
    launcher = Child(lambda: torchrun([str(word) for word in words]))
    assert launcher.wait() == 0, launcher.printed()
    assert [launcher.printed().count(line) for line in ("plan for", "set default is whole", "next: hdovd train")] == [
        1,
        1,
        1,
    ]
    assert _contents(tmp_path / "cache") == _contents(alone)


def test_a_ray_worker_is_killed_and_another_does_its_part(alone: Path, extraction: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "extraction.json").write_text(json.dumps(extraction(tmp_path).to_dict()))
    done = _run(
        [Path(__file__).parents[2] / "helpers" / "ray_with_a_death.py", "extraction.json", "cache", 16, 16], tmp_path
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["whole"]
    assert seen["at_work"] == 3
    assert seen["killed"]
    assert any("room for 3 workers, each with 1 CPU" in line for line in seen["lines"])
    assert _contents(tmp_path / "cache") == _contents(alone)


def test_ray_takes_no_shard(extraction: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(HdovdError, match="without --shard"):
        extract_clip(extraction(tmp_path / "cache", executor=Executor.RAY, share=Share(0, 2)))
    assert not (tmp_path / "cache").exists()


# --- jobs of submitit ---


def _settings(folder: Path, text: str) -> Path:
    file = folder / "jobs.toml"
    file.write_text(f'cluster = "local"\nfolder = "{folder / "jobs"}"\n{text}\n')
    return file


def _tasks(folder: Path) -> list[int]:
    """Processes that do the work of jobs with this folder, by their ids."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" in words and os.fsencode(folder) in words:
                found.append(int(place.name))
    return sorted(found)


def test_submitits_jobs_are_killed_and_preempted_and_nothing_is_lost(
    alone: Path, extraction: Config, tmp_path: Path
) -> None:
    """The parts of pictures are claimed here until both jobs have come to them: so both are at work when one is killed
    and the other is told that its time is over.
    """
    pytest.importorskip("submitit")
    cache, jobs = tmp_path / "cache", tmp_path / "jobs"
    config = extraction(
        cache, part_rows=16, batch_size=16, executor=Executor.SUBMITIT, submitit=_settings(tmp_path, "jobs = 2")
    )

    def extract() -> None:
        with lines_to(partial(print, flush=True)):
            assert extract_clip(config).whole

    child = Child(extract)
    with contextlib.ExitStack() as claims:
        while not (products := {f.parent.parent.name: f.parent for f in cache.glob("*/*/zarr.json")}).keys() >= {
            "noun",
            "class",
            "image",
            "instance",
            "pseudo_label",
        }:
            time.sleep(0.02)
        folder = Catalog(cache).folder
        for level in ("image", "instance"):
            for part in range(100):
                claims.enter_context(folder.claim(f"{products[level].relative_to(cache)}/{part}", wait=True))
        while len(_tasks(jobs)) < 2 or not all(
            Product(folder, level, products[level].name).whole for level in (Level.CLASS, Level.NOUN)
        ):
            time.sleep(0.02)
        killed, preempted = _tasks(jobs)
        os.kill(preempted, signal.SIGUSR2)
        os.kill(killed, signal.SIGKILL)
        while not any("Requeued job" in log.read_text() for log in jobs.glob("*_log.*")):
            time.sleep(0.02)
    assert child.wait() == 0, child.printed()
    assert child.printed().count("to do, by local jobs ") == 2  # once more for what the killed one has left
    assert "set default is whole" in child.printed()
    assert _contents(cache) == _contents(alone)


def test_submitits_jobs_that_do_nothing_are_an_error(extraction: Config, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    from hdovd.pipelines.extraction.executors import do_with_submitit

    config = extraction(tmp_path / "cache", executor=Executor.SUBMITIT, submitit=_settings(tmp_path, "jobs = 1"))
    work = prepare(config)
    work.begin(Catalog.create(config.cache))
    with pytest.raises(HdovdError, match=r"none finished anything; they say: TypeError: .*has no len"):
        do_with_submitit(work, config, len)  # type: ignore[arg-type]
    for text, reason in (
        ('jobs = "two"', "'str' object cannot be interpreted"),
        ("slurm_partitoin = 1", "Unknown argument 'partitoin'"),
        ("gpus = 1", "'gpus' need to be prefixed"),
        ('timeout_min = "1 h"', 'Parameter "timeout_min" expected type'),
    ):
        with pytest.raises(HdovdError, match=rf"--submitit .*jobs.toml: .*{reason}"):
            do_with_submitit(work, replace(config, submitit=_settings(tmp_path, text)), len)  # type: ignore[arg-type]


def test_submitits_options(extraction: Config, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="without --shard"):
        extract_clip(extraction(tmp_path / "cache", executor=Executor.SUBMITIT, share=Share(0, 2)))
    with pytest.raises(HdovdError, match="without --executor submitit"):
        extraction(tmp_path / "cache", executor=Executor.SUBMITIT, retry_failed=True)
    with pytest.raises(HdovdError, match="give both"):
        extraction(tmp_path / "cache", submitit=tmp_path / "jobs.toml")
    with pytest.raises(HdovdError, match=r"jobs\.toml"):
        extract_clip(extraction(tmp_path / "cache", executor=Executor.SUBMITIT, submitit=tmp_path / "jobs.toml"))
    assert not (tmp_path / "cache").exists()
