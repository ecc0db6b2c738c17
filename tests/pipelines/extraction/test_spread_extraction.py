"""An extraction by many processes: started twice by mistake, in shards that change, by torchrun, by Ray. The bytes are
one process's.

Most scenes are real processes played once (`spread_scenes`). The test of Ray needs `pip install 'hdovd[ray]'`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_extractions import Child, play
from spread_scenes import SCENES
from torch.distributed.run import main as torchrun

from hdovd.core.errors import HdovdError
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, Share
from hdovd.pipelines.extraction.extract_clip import extract_clip

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
    assert sum("a worker died at" in line for line in seen["lines"]) == 1
    assert _contents(tmp_path / "cache") == _contents(alone)


def test_ray_takes_no_shard(extraction: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(HdovdError, match="without --shard"):
        extract_clip(extraction(tmp_path / "cache", executor=Executor.RAY, share=Share(0, 2)))
    assert not (tmp_path / "cache").exists()
