"""`hdovd runs`, with and without its subcommands' names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hdovd.cli.main import app
from hdovd.config.recipe import Recipe


@pytest.fixture
def two_runs(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> Path:
    for seed in (0, 1):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        (run / "config.toml").write_text(micro_recipe(f"train.seed={seed}").to_toml())
        (run / "run.json").write_text("{}")
    return tmp_path


def _run(*words: object) -> Any:
    result = CliRunner().invoke(app, ["runs", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_lists_the_current_folder_or_those_named(two_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_runs)
    assert "run0" in _run()
    assert "run1" in _run()
    assert "run0" not in _run("run1")
    assert _run("ls", "run1") == _run("run1")
    assert [entry["seed"] for entry in json.loads(_run("--json"))] == [0, 1]
    assert [entry["path"] for entry in json.loads(_run("run1", "--json"))] == ["run1"]
    assert json.loads(_run("--json", "run1", "run0"))[0]["different"] == {"train.seed": 0}


def test_diff(two_runs: Path) -> None:
    assert "train.seed  0  1" in _run("diff", two_runs / "run0", two_runs / "run1")


def test_help_names_both() -> None:
    for words in (["-h"], ["--help"]):
        text = _run(*words)
        assert "diff" in text
        assert "ls" in text
