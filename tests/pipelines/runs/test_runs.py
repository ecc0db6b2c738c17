"""Run folders as a table and side by side: states, settings that differ, odd folders, AP."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.pipelines.common.settings import different_keys, flat, short_names, shown_apart
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.runs import RunFolder, read_run
from hdovd.pipelines.runs.listing import State, difference_lines, find_runs, run_lines, run_values

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> WriteRun:
    """A run folder as training and evaluation leave it, its AP given: `write_run("a", "train.lr=0.1", novel=12.0)`."""

    def write(
        name: str,
        *settings: str,
        novel: float | None = None,
        steps: tuple[int, ...] = (2, 4),
        key: str = "k1",
        classes: dict[str, float | None] | None = None,
        under: Path = tmp_path,
    ) -> Path:
        path = under / name
        path.mkdir(parents=True)
        (path / "config.toml").write_text(micro_recipe("train.epochs=2", *settings).to_toml())
        (path / "run.json").write_text(
            json.dumps(
                {
                    "protocol": {"name": "p", "base": ["cat"], "novel": ["owl"]},
                    "versions": {"torch": "2.6", "hdovd": "0.1.0"},
                    "cache": {"path": "/c", "levels": {"instance": {"key": key, "inputs": {"clip": {"model": key}}}}},
                    "skipped": {},
                }
            )
        )
        (path / "log.jsonl").write_text(
            "".join(json.dumps({"step": s, "epoch": e}) + "\n" for e, s in enumerate(steps, start=1))
        )
        if steps:
            (path / "model.safetensors").touch()
        if novel is not None:
            group = {"novel": novel, "base": 50.0, "all": 40.0}
            (path / "metrics.json").write_text(
                json.dumps(
                    {
                        "ap50": group,
                        "split_blind": {"ap50": group | {"novel": novel - 1}},
                        "per_class": {n: {"ap50": v} for n, v in (classes or {}).items()},
                    }
                )
            )
        return path

    return write


# --- settings ---


def test_settings_by_dotted_key_and_those_that_differ() -> None:
    a, b = (
        flat({"train": {"lr": 0.1, "seed": 0}, "x": {"y": {"z": [1]}}}),
        flat({"train": {"lr": 0.2, "seed": 0}, "x": {"y": {"z": [1]}}}),
    )
    assert a == {"train.lr": 0.1, "train.seed": 0, "x.y.z": [1]}
    assert different_keys([a, b]) == ["train.lr"]
    assert different_keys([a, {**a, "new": None}]) == ["new"]  # a key without value is not a missing key
    assert different_keys([{"k": True}, {"k": 1}]) == ["k"]


def test_short_names_tell_all_keys_apart(micro_recipe: Callable[..., Recipe]) -> None:
    keys = list(flat(micro_recipe().model_dump(by_alias=True)))
    names = short_names(keys, keys)
    assert len(set(names.values())) == len(keys)
    assert names["train.lr"] == "lr"
    assert names["loss.instance.enabled"] == "instance"
    assert names["loss.class.weight"] == "class.weight"
    assert short_names(["train.lr"], keys) == {"train.lr": "lr"}  # whatever else is asked for


def test_values_of_a_column_stay_apart_when_they_are_cut() -> None:
    one, two = "/a/very/long/path/to/some/place/weights.pth", "/another/very/long/path/to/weights.pth"
    assert shown_apart([one, None]) == ["weights.pth", "-"]
    assert shown_apart([one, two, one]) == [one, two, one]


# --- states ---


@pytest.mark.parametrize(
    ("steps", "novel", "done", "state"),
    [
        ((2, 4), 12.0, 2, State.FINISHED),
        ((2, 4), None, 2, State.NOT_EVALUATED),
        ((2, 3), None, 1, State.STOPPED),
        ((2,), None, 1, State.STOPPED),
        ((), None, 0, State.STOPPED),
    ],
)
def test_state_and_epochs(
    write_run: WriteRun, steps: tuple[int, ...], novel: float | None, done: int, state: State
) -> None:
    run = read_run(write_run("run", steps=steps, novel=novel))
    assert (run.epochs_done, run.epochs, run.state, run.wrong) == (done, 2, state, ())


def test_a_torn_last_line_of_the_log_is_what_a_kill_leaves(write_run: WriteRun) -> None:
    path = write_run("run")
    with (path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    assert read_run(path).state is State.NOT_EVALUATED


def test_a_damaged_line_of_the_log_hides_no_epoch(write_run: WriteRun) -> None:
    path = write_run("run", novel=10.0)
    first, *others = (path / "log.jsonl").read_text().splitlines()
    (path / "log.jsonl").write_text("\n".join([first, "nonsense", "5", *others, ""]))
    run = read_run(path)
    assert (run.epochs_done, run.state, len(run.wrong)) == (2, State.DAMAGED, 2)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_log_that_is_no_file_stops_no_listing(write_run: WriteRun, make: Callable[[Path], None]) -> None:
    path = write_run("run")
    (path / "log.jsonl").unlink()
    make(path / "log.jsonl")
    assert read_run(path).epochs_done == 0


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.json", "{", "run.json: "),
        ("run.json", "[]", "run.json holds no object"),
        ("run.json", None, "no run.json"),
        ("config.toml", "train = ", "config.toml: "),
        ("config.toml", None, "no config.toml"),
        ("metrics.json", '{"ap50": 3}', "no AP50: run hdovd eval again"),
        ("metrics.json", "\udcff", "metrics.json: "),
        ("log.jsonl", 'nonsense\n{"step": 2, "epoch": 1}\n', "log.jsonl: line 1"),
        ("run.json", "[" * 20_000, "run.json: "),
        ("metrics.json", "[" * 20_000, "metrics.json: "),
        ("log.jsonl", "[" * 20_000 + '\n{"step": 2, "epoch": 1}\n', "log.jsonl: line 1"),
    ],
)
def test_a_damaged_run_is_listed_with_what_is_wrong(
    write_run: WriteRun, tmp_path: Path, name: str, content: str | None, expected: str
) -> None:
    write_run("sound", novel=10.0)
    path = write_run("odd", novel=11.0)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content.encode(errors="surrogateescape"))
    odd, sound = map(read_run, find_runs([tmp_path]))
    assert (odd.state, sound.state) == (State.DAMAGED, State.FINISHED)
    assert expected in odd.wrong[0]
    assert any(expected in line for line in run_lines([odd, sound]))
    assert json.loads(json.dumps(run_values([odd, sound])))[0]["wrong"] == list(odd.wrong)


def test_finds_runs_at_any_depth_once(write_run: WriteRun, tmp_path: Path) -> None:
    a, b = write_run("x/y/a"), write_run("b")
    write_run("pictures/inside", under=a)
    write_run("runs/inside", under=tmp_path / "cache")
    (tmp_path / "cache" / "zarr.json").touch()
    (tmp_path / "link").symlink_to(a.parent)
    assert find_runs([tmp_path, b]) == [b, a]
    assert find_runs([a]) == [a]
    with pytest.raises(HdovdError, match="none: no such folder"):
        find_runs([tmp_path / "none"])


def test_an_old_or_strange_run_is_listed(write_run: WriteRun) -> None:
    path = write_run("old", novel=None)
    (path / "run.json").write_text(
        '{"cache": [], "versions": 3, "time": "2026-01-02T03:04:05+00:00", "git": {"commit": "abc"}, '
        '"protocol": {"metric": ["ap"]}}'
    )
    (path / "config.toml").write_text(
        "[train]\nepochs = 2\n[loss.image]\nenabled = true\n[loss.extra.mine]\nuse = 'a:B'\n"
    )
    run = read_run(path)
    assert run.state is State.NOT_EVALUATED
    assert (run.date.timestamp(), run.git, run.cache_id, run.distillation) == (
        1767323045,
        {"commit": "abc"},
        None,
        ("image", "mine"),
    )
    assert len(run_lines([run])) == 3


# --- table and differences ---


def test_table_shows_the_settings_that_differ(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run("a", "train.lr=0.1", "train.seed=4", novel=12.34)
    write_run("b", "train.lr=0.2", "loss.image.enabled=false", key="k2", steps=(2,))
    head, a, b, *_ = run_lines([read_run(path) for path in find_runs([tmp_path])])
    assert head.split()[:6] == ["name", "settings", "levels", "seed", "epochs", "novel"]
    assert a.split()[:9] == ["a", "lr=0.1", "instance+class+image", "4", "2/2", "12.3", "50.0", "40.0", "11.3"]
    assert a.split()[9] == read_run(tmp_path / "a").cache_id
    assert b.split()[:9] == ["b", "lr=0.2", "instance+class", "0", "1/2", "-", "-", "-", "-"]
    assert b.endswith("stopped")
    assert read_run(tmp_path / "a").cache_id != read_run(tmp_path / "b").cache_id


def test_difference_of_two_runs(write_run: WriteRun) -> None:
    a = write_run("a", "train.lr=0.1", novel=10.0, classes={"cat": 50.0, "owl": 10.0, "elk": 7.0, "yak": None})
    b = write_run("b", "train.lr=0.2", novel=30.0, key="k2", classes={"cat": 49.0, "owl": 30.0, "elk": 7.0, "yak": 3.0})
    record = json.loads((b / "run.json").read_text())
    record |= {"versions": {"torch": "2.7", "hdovd": "0.1.0"}, "git": {"commit": "abc", "dirty": True}}
    (b / "run.json").write_text(json.dumps(record))
    text = [line.split() for line in difference_lines(a, b)]
    for head, *rows in (
        ("config", ["train.lr", "0.1", "0.2"]),
        ("cache", ["instance.key", "k1", "k2"], ["instance.clip.model", "k1", "k2"]),
        ("versions", ["torch", "2.6", "2.7"]),
        ("git", ["commit", "-", "abc"], ["dirty", "-", "on"]),
    ):
        at = text.index([head, "A", "B"])
        assert text[at + 1 : at + 2 + len(rows)] == [*rows, []]
    assert ["protocol:", "the", "same"] in text
    at = text.index(["AP50,", "percent", "A", "B", "B", "-", "A"])
    assert text[at + 1] == ["novel", "10.0", "30.0", "+20.0"]
    assert text[at + 4] == ["novel", "split-blind", "9.0", "29.0", "+20.0"]
    at = text.index(["classes", "that", "differ", "A", "B", "B", "-", "A"])
    assert text[at + 1 :] == [["owl", "(novel)", "10.0", "30.0", "+20.0"], ["cat", "50.0", "49.0", "-1.0"]]


def test_real_runs(distilled: RunFolder, base_only: RunFolder, world: Path, tmp_path: Path) -> None:
    """What training and evaluation write is what the table reads."""
    evaluated = Path(shutil.copytree(distilled.path, tmp_path / "evaluated"))
    result = evaluate(EvalConfig(run=evaluated, data=DataPaths(world), device="cpu"))
    run, plain = read_run(evaluated), read_run(base_only.path)
    assert (run.state, run.epochs_done, run.epochs) == (State.FINISHED, 3, 3)
    assert (plain.state, plain.epochs_done, plain.epochs) == (State.NOT_EVALUATED, 1, 1)
    assert run.ap == result.combined.summary()["ap50"]
    assert run.split_blind == result.split_blind.summary()["ap50"]
    assert (run.distillation, plain.distillation) == (("instance", "class", "image"), ())
    assert run.cache_id == plain.cache_id
    assert run.levels["instance"]["key"]
    lines = difference_lines(evaluated, base_only.path)
    at = next(number for number, line in enumerate(lines) if line.split() == ["config", "A", "B"])
    assert {line.split()[0] for line in lines[at + 1 : lines.index("cache: the same") - 1]} == {
        "loss.instance.enabled",
        "loss.class.enabled",
        "loss.image.enabled",
        "train.epochs",
    }
    assert {"versions: the same", "protocol: the same"} <= set(lines)
    assert not any("classes that differ" in line for line in lines)
