"""Trackers against what they write, read by the programs' own readers; and runs that are killed and go on."""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import train_scenes
from forked_group import ranks

from hdovd.cli.main import main
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.runs import RunFolder, tracking
from hdovd.pipelines.runs.trackers import Tracker, tracker_class

SETTINGS = ("train.epochs=2", "train.batch_size=4")  # 23 images: 5 steps an epoch
Values = dict[str, list[tuple[int, float]]]  # (step, value) by name, in the order of the tracker
Play = Callable[..., None]


@pytest.fixture(scope="module")
def play(world: Path, training_cache: Path, micro_settings: list[str]) -> Play:
    """A run that is validated, and saved after every epoch."""

    def run(out: Path, *track: str, code: int = 0, world_size: int = 1, **job: Any) -> None:
        whole = {
            "data": str(world),
            "cache": str(training_cache),
            "out": str(out),
            "protocol": str(world / "protocol.toml"),
            "settings": [*(word for word in micro_settings[2:] if word != "--set"), *SETTINGS],
            "save_minutes": 60.0,
            "log_every": 1,
            "validate": True,
            "track": track,
        } | job
        found, printed = ranks(partial(train_scenes.main, whole), out.with_name("printed.txt"), world_size)
        assert found == code, printed

    return run


def logged(run: Path) -> Values:
    """What log.csv says, by the names of trackers."""
    found: Values = {}
    with (run / "log.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    plain = name in ("lr", "images_per_s", "data_wait", "memory_gb") or name.startswith("val_")
                    found.setdefault(name if plain else f"loss/{name}", []).append((int(row["step"]), float(value)))
    return found


def of_tensorboard(run: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def leveldb_records(log: bytes, skipped: int = 7) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, of which `skipped` bytes stand before `log`; parts of records in
    them with a checksum, a length, and whether they are whole (1), the first (2), further (3) or the last part (4).
    """
    at, record = 0, b""
    while at + 7 <= len(log):
        if (left := 32768 - (at + skipped) % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def of_wandb(run: Path) -> Values:
    """By W&B's own messages in the files that it writes offline, one for each time that the run began or went on."""
    from wandb.proto import wandb_internal_pb2 as records

    found: Values = {}
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len({file.name for file in files}) == 1  # one identity
    for file in files:
        for data in leveldb_records(file.read_bytes()[7:]):  # after W&B's own header
            record = records.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if name != "step" and not name.startswith("_"):
                    found.setdefault(name, []).append((row["step"], value))
    return found


def of_mlflow(run: Path) -> Values:
    client = pytest.importorskip("mlflow.tracking").MlflowClient(f"sqlite:///{run}/mlflow/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "hdovd"]
    (found,) = client.search_runs([experiment.experiment_id])  # one, however often it went on
    assert found.info.run_name == run.name
    assert found.data.params["train.epochs"] == "2"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


def require(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test, with a message, if the tracker's package is not installed; offline otherwise."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if name in READERS:
        pytest.importorskip(name)


def require_same(found: Values, wanted: Values, *, speeds: bool = True) -> None:
    """`speeds`: whether what a clock decides is compared too."""
    for values in (found, wanted) if not speeds else ():
        for name in ("images_per_s", "data_wait", "memory_gb"):
            values[name] = [(step, 0.0) for step, _ in values[name]]
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert all(
            math.isclose(one, two, rel_tol=1e-6) for (_, one), (_, two) in zip(found[name], values, strict=True)
        ), name


@pytest.mark.parametrize("name", READERS)
def test_values_are_those_of_the_log(name: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(name, monkeypatch)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    play(out, name)
    wanted = logged(out)
    assert [step for step, _ in wanted["val_base"]] == [5, 10]
    assert len(wanted["lr"]) == 10
    require_same(READERS[name](out), wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "printed.txt"}  # nothing beside the run


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_goes_on_after_a_kill_repeats_no_step(
    name: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed three steps after its checkpoint, of the first epoch's end: three steps are trained and logged again."""
    require(name, monkeypatch)
    out = tmp_path / "run"
    play(out, name, kill_at=8, code=-signal.SIGKILL)
    assert len(RunFolder(out).entries()) == 9
    play(out, name, resume=True)
    found, wanted = READERS[name](out), logged(out)
    if name == "wandb":  # its own process had not written all of the killed part
        wanted = {name: [value for value in wanted[name] if value[0] in dict(found[name])] for name in wanted}
        assert {9, 10} <= dict(found["lr"]).keys()
    require_same(found, wanted, speeds=False)


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_was_told_to_stop_goes_on_as_the_same_tracked_run(
    name: str, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(name, monkeypatch)
    out = tmp_path / "run"
    play(out, name, kill_at=8, signal=signal.SIGTERM, code=75)
    play(out, name, resume=True)
    require_same(READERS[name](out), logged(out))


def test_a_tracker_that_is_added_later_is_sent_the_whole_log(play: Play, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(out, kill_at=8, code=-signal.SIGKILL)
    play(out, "tensorboard", resume=True)
    require_same(of_tensorboard(out), logged(out))


def test_only_the_process_that_leads_is_tracked(play: Play, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(out, "tensorboard", world_size=2)
    assert len(list((out / "tensorboard").iterdir())) == 1
    require_same(of_tensorboard(out), logged(out))


def test_eval_sends_its_ap(play: Play, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    play(out, "tensorboard")
    evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", track=("tensorboard",)))
    ap = json.loads((out / "metrics.json").read_text())["ap50"]
    found = of_tensorboard(out)
    assert {f"eval_{group}": [(10, pytest.approx(value))] for group, value in ap.items()} == {
        name: values for name, values in found.items() if name.startswith("eval_")
    }
    require_same({name: found[name] for name in found if not name.startswith("eval_")}, logged(out))


class Lines(Tracker):
    """A tracker of the user's own, which is out of order while `broken` is there."""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        self.file, self.broken = run / "lines.jsonl", run / "broken"
        self.about = {"identity": identity, "epochs": settings["train.epochs"]}

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.broken.exists():
            raise ConnectionError("no answer,\nsecret of another line")
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **self.about, **values}) + "\n")

    def finish(self) -> None:
        raise OSError("cannot be closed")


class Refuses(Tracker):
    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        raise RuntimeError("not logged in")


def test_a_tracker_of_ones_own_that_fails_for_a_while_misses_nothing(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own_trackers", sys.modules[__name__])
    out = tmp_path / "run"
    play(out)
    run, told = RunFolder(out), list[str]()
    with lines_to(told.append), tracking(run, ["own_trackers:Lines"]) as tracked:
        (out / "broken").touch()
        for step in (11, 12):
            run.log({"step": step, "epoch": 3, "rpn": step / 10})
            tracked.follow()
        (out / "broken").unlink()
        run.log({"step": 13, "epoch": 3, "rpn": 1.3})
    assert told == [
        "NOT tracked by own_trackers:Lines for now, and the run goes on: ConnectionError: no answer, secret of "
        "another line",
        "own_trackers:Lines was not closed as it should be: OSError: cannot be closed",
    ]
    lines = [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [entry["step"] for entry in run.entries()]
    assert [line["loss/rpn"] for line in lines[-3:]] == [1.1, 1.2, 1.3]
    assert {(line["identity"], line["epochs"]) for line in lines} == {(lines[0]["identity"], 2)}


def test_trackers_that_cannot_begin(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_trackers", sys.modules[__name__])
    out = tmp_path / "run"
    play(out)
    why = r"--track own_trackers:Refuses cannot begin: RuntimeError: not logged in\. "
    with pytest.raises(HdovdError, match=why), tracking(RunFolder(out), ["own_trackers:Refuses"]):
        pass
    with pytest.raises(HdovdError, match=r"expected a class of hdovd.pipelines.runs.trackers.Tracker"):
        tracker_class("math:sqrt")


def test_wrong_names_are_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(name: str) -> str:
        words = ["hdovd", "train", "--data", "none", "--cache", "none", "--out", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", [*words, "--track", name])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        return capsys.readouterr().err

    assert "did you mean wandb: expected tensorboard, wandb, mlflow, or my_module:name" in told("wanb")
    monkeypatch.setattr("hdovd.pipelines.runs.trackers.find_spec", lambda name: None)
    assert told("mlflow") == 'error: --track mlflow needs the package mlflow: pip install "hdovd[mlflow]"\n'
