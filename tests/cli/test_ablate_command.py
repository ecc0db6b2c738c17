"""`hdovd ablate` from the first run to the table: stopped, gone on with, run again for nothing, and with a cell that
fails.

Every command of a run is a process that imports torch, for seconds: what is not about such a process is done in this
one beforehand, and the others are forked from it, `hdovd ablate` itself too. Only the run that fails is a fresh one.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_commands import forked_jobs
from typer.testing import CliRunner

from hdovd.cli.main import app
from hdovd.data import DataPaths
from hdovd.pipelines.ablation.ablate import LOCK, AblateConfig, plan
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.training.train import TrainConfig, train

Watch = Callable[[Path], Any]
GRID = ("--grid", "loss.image.enabled=true,false", "train.lr=0.002")  # the second without --grid: more of it
CELLS = ("image-on_lr-0.002", "image-off_lr-0.002")


@dataclass(frozen=True)
class Scene:
    """An ablation that was stopped after its first run, then gone on with. All runs but the second were trained before,
    and the third evaluated too.
    """

    words: tuple[str, ...]
    out: Path
    stopped: subprocess.CompletedProcess[str]
    first_metrics_ns: int
    table_when_stopped: str
    lock_was_free: bool
    went_on: Any


def _words(world: Path, cache: Path, settings: list[str], out: Path) -> tuple[str, ...]:
    return (
        "ablate",
        "--data",
        str(world),
        "--protocol",
        str(world / "protocol.toml"),
        "--cache",
        str(cache),
        "--device",
        "cpu",
        *settings,
        "--out",
        str(out),
    )


def _here(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def _trained_before(config: AblateConfig) -> None:
    first, _, third, last = plan(config)
    for planned in (first, third, last):
        train(
            TrainConfig(
                data=config.data,
                cache=config.cache,
                out=planned.path,
                recipe=planned.recipe,
                protocol=config.protocol,
                device="cpu",
            )
        )
    evaluate(EvalConfig(run=third.path, data=config.data, device="cpu"))
    (first.path / "checkpoint.pt").unlink()  # with one, training goes on, if only to see that it is at its end


@pytest.fixture(scope="module")
def scene(
    world: Path,
    cache: Path,
    micro_settings: list[str],
    forked: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Scene:
    folder = tmp_path_factory.mktemp("ablation")
    out, shared = folder / "with space", Path(shutil.copytree(cache, folder / "cache"))
    words = (*_words(world, shared, micro_settings, out), *GRID, "--seeds", "2")
    _trained_before(
        AblateConfig(
            data=DataPaths(world),
            cache=shared,
            out=out,
            grid=GRID[1:],
            recipe="demo",
            settings=tuple(micro_settings[3::2]),
            seeds=2,
            protocol=str(world / "protocol.toml"),
        )
    )
    first = out / CELLS[0] / "seed0" / "metrics.json"
    with pytest.MonkeyPatch.context() as patch:
        forked_jobs(patch, "train", "eval")
        return _stopped_and_gone_on_with(words, out, first, forked)


def _stopped_and_gone_on_with(words: tuple[str, ...], out: Path, first: Path, forked: Callable[..., Any]) -> Scene:
    process, deadline = forked(words, out.parent), time.monotonic() + 300
    while not (first.exists() and (out / CELLS[0] / "seed1.log").exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # it ended, with an error
            break
    os.kill(process.pid, signal.SIGINT)
    stopped = process.wait()
    assert first.exists(), stopped.stdout + stopped.stderr
    table = (out / "table.md").read_text()
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
    return Scene(words, out, stopped, first.stat().st_mtime_ns, table, free, _here(*words, "--jobs", "2"))


def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(scene: Scene) -> None:
    assert scene.stopped.returncode == 130
    assert "2 of 4 runs are left: the same command goes on" in scene.stopped.stderr
    assert "Traceback" not in scene.stopped.stderr
    assert "1 of 4 runs done" in scene.stopped.stdout
    assert "[1/3]" in scene.stopped.stdout
    assert scene.lock_was_free  # the runs hold it too: none of them is left
    rows = scene.table_when_stopped.splitlines()
    assert "1 of 2" in rows[2]
    assert "1 of 2" in rows[3]


def test_goes_on_with_what_is_left(scene: Scene) -> None:
    assert scene.went_on.exit_code == 0, scene.went_on.output
    assert "2 of 4 runs done" in scene.went_on.output
    assert "2 to do, 2 at a time" in scene.went_on.output
    assert (scene.out / CELLS[0] / "seed0" / "metrics.json").stat().st_mtime_ns == scene.first_metrics_ns
    for cell in CELLS:
        for seed in (0, 1):
            assert json.loads((scene.out / cell / f"seed{seed}" / "metrics.json").read_text())["ap50"]
    assert not (scene.out / CELLS[1] / "seed0.log").exists()  # it was done
    for cell, seed in ((CELLS[0], 0), (CELLS[0], 1), (CELLS[1], 1)):
        log = (scene.out / cell / f"seed{seed}.log").read_text()
        assert ("hdovd train" in log) == ((cell, seed) != (CELLS[0], 0))
        assert "hdovd eval" in log
    assert "is finished already" in (scene.out / CELLS[1] / "seed1.log").read_text()


def test_the_table_is_of_the_metrics(scene: Scene) -> None:
    rows = {row["cell"]: row for row in csv.DictReader((scene.out / "table.csv").open())}
    for cell in CELLS:
        found = [json.loads((scene.out / cell / f"seed{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
        for name, values in (
            ("ap50_base", [m["ap50"]["base"] for m in found]),
            ("ap50_all", [m["ap50"]["all"] for m in found]),
            ("ap50_novel", [m["ap50"]["novel"] for m in found]),
            ("ap50_novel_split_blind", [m["split_blind"]["ap50"]["novel"] for m in found]),
        ):
            assert float(rows[cell][f"{name}_mean"]) == pytest.approx(statistics.mean(values))
            assert float(rows[cell][f"{name}_sd"]) == pytest.approx(statistics.stdev(values))
    table = (scene.out / "table.md").read_text()
    assert table in scene.went_on.output
    assert "Not finished" not in table
    assert r"\bottomrule" in (scene.out / "table.tex").read_text()


def test_run_again_it_runs_nothing(scene: Scene, untouched: Watch) -> None:
    with untouched(scene.out / CELLS[0]), untouched(scene.out / CELLS[1]):
        table = (scene.out / "table.md").read_text()
        again = _here(*scene.words)
        listed = _here(*scene.words, "--dry-run")
    assert again.exit_code == listed.exit_code == 0
    assert "4 of 4 runs done" in again.output
    assert (scene.out / "table.md").read_text() == table
    assert listed.output.count("done  ") == 4
    assert "4 of 4 runs done" in listed.output


def test_dry_run_says_what_is_to_do(scene: Scene) -> None:
    found = _here(*scene.words, "--seeds", "3", "--dry-run")
    assert [line.split(" " + str(scene.out))[0].split("  ")[0] for line in found.output.splitlines()[:-1]] == [
        "done",
        "done",
        "to do",
    ] * 2


def test_another_config_under_the_same_name_is_an_error(scene: Scene) -> None:
    found = CliRunner().invoke(app, [*scene.words, "--set", "train.weight_decay=0.5"])
    assert found.exit_code == 1
    assert "train.weight_decay differs: asked for 0.5, began with 0.01" in str(found.exception)


def test_a_cell_that_fails_is_told_and_the_others_finish(
    scene: Scene, world: Path, micro_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked_jobs(monkeypatch, "eval")
    missing = tmp_path / "missing.pth"
    words = _words(world, scene.out.parent / "cache", micro_settings, tmp_path / "out")
    grid = ("--grid", f"detector.backbone.weights=none,{missing}", "--set", "train.lr=0.002", "--seeds", "1")
    trained = tmp_path / "out" / "weights-none" / "seed0"
    shutil.copytree(scene.out / CELLS[0] / "seed0", trained)
    (trained / "metrics.json").unlink()
    (trained / "checkpoint.pt").unlink(missing_ok=True)
    found = _here(*words, *grid, "--jobs", "2")
    assert found.exit_code == 1, found.output
    assert "FAILED: hdovd train, exit code 1" in found.output
    assert "missing.pth" in found.output.partition("FAILED")[2].partition("|")[0]  # the last lines of its log
    assert "1 failed: weights-missing.pth-" in found.output
    assert json.loads((trained / "metrics.json").read_text())["ap50"]
    log = trained.with_name("seed0.log").read_text()
    assert "hdovd eval" in log
    assert "hdovd train" not in log  # it was trained already
    assert "0 of 1, 1 failed" in (tmp_path / "out" / "table.md").read_text()


@pytest.fixture(scope="module")
def measured(
    world: Path, cache: Path, micro_settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path, Any]:
    """The words, the folder and the end of an ablation of one cell with the two arms of the novel gap."""
    out = tmp_path_factory.mktemp("oracle") / "out"
    shared = Path(shutil.copytree(cache, out.parent / "cache"))
    words = (*_words(world, shared, micro_settings, out), "--oracle", "--seeds", "1", "--jobs", "2")
    with pytest.MonkeyPatch.context() as patch:
        forked_jobs(patch, "train", "eval")
        return words, out, _here(*words)


def test_the_arms_of_the_gap_are_runs_of_the_ablation(measured: tuple[Any, Path, Any], world: Path) -> None:
    _, out, found = measured
    assert found.exit_code == 0, found.output
    records = {
        name: json.loads((out / name / "seed0" / "run.json").read_text()) for name in ("recipe", "base-only", "oracle")
    }
    assert [record.get("oracle") for record in records.values()] == [None, None, True]
    assert len({json.dumps(record["protocol"]) for record in records.values()}) == 1
    log = (out / "oracle" / "seed0.log").read_text()
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    everything = f"{len(tree['images'])} images, boxes of 24 classes, base and novel;"
    assert everything in log
    assert "no open-vocabulary result" in log.partition("hdovd eval")[0]
    assert "no open-vocabulary result" in log.partition("hdovd eval")[2]
    assert "boxes of 16 base classes;" in (out / "base-only" / "seed0.log").read_text()
    metrics = json.loads((out / "oracle" / "seed0" / "metrics.json").read_text())
    assert (metrics["protocol"], metrics["oracle"]) == ("demo-world", True)
    table = (out / "table.md").read_text()
    assert table in found.output
    assert "novel gap closed, %" in table
    rows = {row["cell"]: row for row in csv.DictReader((out / "table.csv").open())}
    cell, base_only, oracle = (float(rows[name]["ap50_novel_seed0"]) for name in records)
    gap = rows["recipe"]["novel_gap_closed_seed0"]
    closed = None if oracle <= base_only else pytest.approx(100 * (cell - base_only) / (oracle - base_only))
    assert (float(gap) if gap else None) == closed


def test_arms_that_are_done_are_not_run_again(measured: tuple[Any, Path, Any], untouched: Watch) -> None:
    words, out, _ = measured
    with untouched(out / "oracle"), untouched(out / "base-only"):
        again = _here(*words)
    assert "3 of 3 runs done" in again.output
    without = _here(*(word for word in words if word != "--oracle"), "--dry-run")
    assert "1 of 1 runs done" in without.output


def test_nobody_takes_an_oracle_for_an_open_vocabulary_detector(measured: tuple[Any, Path, Any], world: Path) -> None:
    _, out, _ = measured
    listed = _here("runs", str(out)).output
    assert [line.split()[2] for line in listed.splitlines() if "oracle/seed0" in line] == ["oracle"]
    assert "oracle: trained on boxes of novel classes too" in listed
    paths = ("--data", str(world), "--protocol", str(world / "protocol.toml"), "--cache", str(out.parent / "cache"))
    audited = [_here("audit", *paths, "--run", str(out / name / "seed0")) for name in ("oracle", "base-only")]
    assert [found.exit_code for found in audited] == [1, 0]
    assert "LEAK     run: boxes" in audited[0].output
    assert "is an oracle: trained on the boxes of novel classes too" in audited[0].output
    assert "1 LEAK" in audited[0].output
    assert "ok       run: boxes" in audited[1].output
