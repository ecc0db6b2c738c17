"""Names that are longer than names can be, and places that cannot be written to: one line, whatever command is told of
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import Ran

from hdovd.config.recipe import load_recipe

LONG = "person, bicycle, " * 20  # more than 255 bytes
NAME = "x" * 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("detect", "nowhere", "a.jpg", "--out", "o", "--classes", LONG), "nowhere is no run"),
        (("train", "--cache", "c", "--out", "o", "--data", ".", "--recipe", LONG), "no recipe"),
        (("train", "--cache", "c", "--out", "o", "--data", ".", "--protocol", LONG), "no protocol"),
        (
            ("extract-clip", "--cache", "c", "--clip", "x", "--data", ".", "--templates", LONG),
            "neither a set nor a file",
        ),
        (("detect", NAME, "a.jpg", "--out", "o"), "File name too long (a name has at most 255 bytes"),
        (("detect", "nowhere", "a.jpg", "--out", NAME), "File name too long"),
        (("detect", "nowhere", "a.jpg", "--out", "o", "--classes", f"@{NAME}"), "File name too long"),
        (("train", "--cache", "c", "--out", NAME, "--data", "."), "File name too long"),
        (("nouns", "--captions", NAME, "--out", "o.json"), "File name too long"),
        (("eval", NAME, "--data", "."), "File name too long"),
        (("report", NAME, "--out", "o"), "File name too long"),
        (("export", NAME, "--out", "a.onnx"), "File name too long"),
        (("audit", "--data", ".", "--cache", NAME), ""),
        (("cache", "ls", NAME), ""),
        (("runs", NAME), ""),
        (("runs", "diff", NAME, NAME), ""),
        (("proposals", "convert", NAME, "--out", "o.json"), ""),
        (("propose", "--data", NAME, "--out", "p.json"), ""),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_names_that_are_too_long(
    hdovd: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = hdovd(*words)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1
    assert len(ran.err) < 800


@pytest.mark.parametrize("command", ["nouns", "proposals convert", "propose", "audit", "cache view", "train"])
def test_a_file_where_the_output_should_have_a_folder(
    command: str,
    hdovd: Callable[..., Ran],
    world: Path,
    cache: Path,
    proposals: Path,
    tmp_path: Path,
    micro_settings: list[str],
) -> None:
    """What cannot be written there cannot be deleted there either: that hides nothing."""
    protocol, annotations = ("--protocol", world / "protocol.toml"), world / "annotations"
    (tmp_path / "file").write_text("of before")
    out = tmp_path / "file" / "a.json"
    words = {
        "nouns": (
            "--captions",
            annotations / "captions_train2017.json",
            "--vocabulary",
            world / "vocabulary.txt",
            "--parser",
            "match",
            *protocol,
            "--out",
            out,
        ),
        "proposals convert": (proposals, "--out", out),
        "propose": ("--data", world, *protocol, "--out", out, *micro_settings, "--device", "cpu"),
        "audit": ("--data", world, *protocol, "--cache", cache, "--json", out),
        "cache view": (cache, "--image", 1, "--out", out.with_suffix(".png")),
        "train": ("--data", world, *protocol, "--cache", cache, "--out", out, *micro_settings, "--device", "cpu"),
    }[command]
    ran = hdovd(*command.split(), *words)
    assert ran.code == 1
    assert f"{tmp_path / 'file'} is a file, expected a folder" in ran.err, ran.err
    assert (tmp_path / "file").read_text() == "of before"


def test_a_current_folder_that_is_gone(
    hdovd: Callable[..., Ran], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ran = hdovd(
        "nouns",
        "--captions",
        world / "annotations" / "captions_train2017.json",
        "--vocabulary",
        world / "vocabulary.txt",
        "--parser",
        "match",
        "--protocol",
        world / "protocol.toml",
        "--out",
        "n.json",
    )
    assert ran.code == 1
    assert "error: the current folder is not there any more: change to another one" in ran.err


def test_a_picture_whose_name_is_too_long_is_skipped_by_name(hdovd: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.toml").write_text(load_recipe("demo").to_toml())
    protocol = {"name": "mine", "base": ["cat"], "novel": ["dog"]}
    (tmp_path / "run.json").write_text(json.dumps({"protocol": protocol, "cache": {"path": None, "levels": {}}}))
    ran = hdovd("detect", tmp_path, NAME, "--out", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "File name too long" in ran.err
