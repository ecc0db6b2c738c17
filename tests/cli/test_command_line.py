"""The command `hdovd`: help that leads on, errors on one screen."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from command_runs import Ran

from hdovd.cli.main import main
from hdovd.core import log
from hdovd.pipelines.demo import run as demo_stages
from hdovd.pipelines.demo.config import DemoConfig

NEXT = {
    (): ["hdovd demo", "propose", "nouns", "extract-clip", "train", "eval", "detect"],
    ("demo",): ["propose", "extract-clip", "train", "eval"],
    ("propose",): ["hdovd extract-clip"],
    ("nouns",): ["hdovd extract-clip --nouns"],
    ("extract-clip",): ["hdovd train"],
    ("train",): ["hdovd eval"],
    ("eval",): ["metrics.json", "detections.json"],  # the last one: what it leaves
    ("ablate",): ["hdovd runs", "table.md"],
    ("runs",): ["hdovd runs diff A B"],
}


# --- help ---


@pytest.mark.parametrize("command", NEXT, ids=lambda c: " ".join(c) or "hdovd")
def test_help_tells_what_to_do_next(command: tuple[str, ...], tmp_path: Path, python: Callable[..., Any]) -> None:
    found = python(["-m", "hdovd", *command, "--help"], tmp_path)
    assert found.returncode == 0, found.stderr
    text = re.sub(r"[\s│]+", " ", found.stdout)
    for word in NEXT[command]:
        assert word in text


def test_short_help_and_version(hdovd: Callable[..., Ran]) -> None:
    import hdovd as package

    assert hdovd("-h").code == 0
    assert hdovd("--version").out.strip() == f"hdovd {package.__version__}"


def test_options_name_their_defaults(hdovd: Callable[..., Ran]) -> None:
    text = hdovd("train", "--help").out
    for default in ("ov-coco-faster-rcnn-r50", "ov-coco", "auto"):
        assert f"[default: {default}]" in text


def test_stages_of_the_demo_are_commands_of_the_same_program(
    hdovd: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole demo takes minutes: here its stages are one that succeeds and one that does not."""

    def stages(config: DemoConfig, call: Callable[[list[str]], None]) -> None:
        log(f"into {config.out}")
        call(["runs", str(tmp_path)])
        call(["cache", "ls", str(tmp_path / "none")])

    monkeypatch.setattr(demo_stages, "demo", stages)
    found = hdovd("demo", "--out", tmp_path / "demo")
    assert found.code == 1
    assert found.out.splitlines() == [f"into {tmp_path / 'demo'}", "no runs here: hdovd train --out RUN makes one"]
    assert "no feature cache at" in found.err


# --- errors ---


def test_error_is_one_message_without_a_traceback(tmp_path: Path, python: Callable[..., Any]) -> None:
    found = python(
        ["-m", "hdovd", "train", "--recipe", "demo", "--set", "nonsense", "--cache", "c", "--out", "o"], tmp_path
    )
    assert found.returncode == 1
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stderr.startswith("error: ")
    assert "nonsense" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_data_folder_is_one_message(hdovd: Callable[..., Ran], tmp_path: Path) -> None:
    found = hdovd("train", "--data", tmp_path / "no such folder", "--cache", tmp_path / "c", "--out", tmp_path / "o")
    assert found.code == 1
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert "no such folder" in found.err
    assert "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    from hdovd.core import HdovdError

    words = ["extract-clip", "--data", str(tmp_path / "none"), "--cache", "c", "--clip", "x"]
    monkeypatch.setattr(sys, "argv", ["hdovd", "--debug", *words] if before else ["hdovd", *words, "--debug"])
    with pytest.raises(HdovdError, match="none"):  # what reaches the interpreter is what it shows
        main()


def test_debug_traceback_in_a_process_of_its_own(tmp_path: Path, python: Callable[..., Any]) -> None:
    found = python(["-m", "hdovd", "--debug", "train", "--set", "nonsense", "--cache", "c", "--out", "o"], tmp_path)
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "HdovdError" in found.stderr


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("loss.instanse.enabled=false", r"unknown key loss\.instanse.*loss\.instance\.enabled"),
        ("train.lerning_rate=0.1", r"unknown key train\.lerning_rate"),
        ("train.epoch=3", r"unknown key train\.epoch;.*train\.epochs"),
        ("train.epochs=many", r"train\.epochs = 'many'"),
        ("train.epochs=2.5", r"train\.epochs = 2\.5"),
        ("train.epochs=-1", r"train\.epochs = -1"),
        ("loss.image.enabled=1", r"loss\.image\.enabled = 1"),
        ("train.epochs", r"key=value"),
        ("=3", r"key=value"),
        ("train.epochs.more=3", r"'epochs' is a value"),
    ],
)
def test_wrong_setting_names_the_key(hdovd: Callable[..., Ran], setting: str, expected: str) -> None:
    found = hdovd("train", "--recipe", "demo", "--cache", "c", "--out", "o", "--data", "d", "--set", setting)
    assert found.code == 1
    assert re.search(expected, found.err.replace("\n", " ")), found.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--recipe", "demmo", "--cache", "c", "--out", "o", "--data", "d"), "did you mean 'demo'"),
        (
            ("train", "--recipe", "demo", "--cache", "c", "--out", "o"),
            "--data ROOT, or both --images and --annotations",
        ),
        (
            ("train", "--recipe", "demo", "--cache", "c", "--out", "o", "--data", ".", "--protocol", "lvis"),
            "no protocol 'lvis'",
        ),
        (("eval", "nowhere", "--data", "."), "no run"),
        (
            ("eval", "nowhere", "--data", ".", "--workers", "many"),
            "--workers many: expected auto, or a whole number from 0",
        ),
        (("extract-clip", "--cache", "c", "--clip", "x", "--data", ".", "--captions", "c.json"), "--vocabulary"),
        (
            ("extract-clip", "--cache", "c", "--clip", "x", "--data", ".", "--shard", "4/4"),
            "--shard 4/4: expected I/N with I from 0 to N-1",
        ),
        (
            ("extract-clip", "--cache", "c", "--clip", "x", "--data", ".", "--shard", "1of4"),
            "--shard 1of4: expected I/N, such as 0/8",
        ),
        (
            ("extract-clip", "--cache", "c", "--clip", "x", "--data", ".", "--features", "a/b"),
            "--features 'a/b': expected letters",
        ),
    ],
    ids=["recipe", "no data", "protocol", "run", "eval workers", "captions", "shard", "shard in words", "features"],
)
def test_user_errors(
    hdovd: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = hdovd(*words)
    assert found.code == 1
    assert expected in found.err
    assert "Traceback" not in found.err


def test_missing_templates_file_names_its_own_option(hdovd: Callable[..., Ran], tmp_path: Path) -> None:
    found = hdovd(
        "extract-clip",
        "--cache",
        tmp_path / "c",
        "--clip",
        "x",
        "--data",
        tmp_path,
        "--templates",
        tmp_path / "none.txt",
    )
    assert found.code == 1
    assert (
        f"--templates {tmp_path / 'none.txt'}: neither a set nor a file. The sets are clip80, photo, vild" in found.err
    )
    assert "--vocabulary" not in found.err


def test_unknown_device_is_a_user_error(
    hdovd: Callable[..., Ran], world: Path, cache: Path, tmp_path: Path, micro_settings: list[str]
) -> None:
    found = hdovd(
        "train",
        "--data",
        world,
        "--protocol",
        world / "protocol.toml",
        "--cache",
        cache,
        "--out",
        tmp_path / "run",
        "--device",
        "gpu",
        *micro_settings,
    )
    assert found.code in (1, 2)
    assert "unexpected" not in found.err
    assert "gpu" in found.err


# --- nouns ---


def test_nouns_by_command(hdovd: Callable[..., Ran], world: Path, tmp_path: Path) -> None:
    out, captions = tmp_path / "with space" / "nouns.json", world / "annotations" / "captions_train2017.json"
    common = ("nouns", "--captions", captions, "--out", out, "--protocol", world / "protocol.toml", "--vocabulary")
    ran = hdovd(*common, world / "vocabulary.txt")
    assert ran.code == 0, ran.err
    assert "24 captions of 24 images" in ran.out
    assert "of the 8 novel names, in images: " in ran.out
    assert f"next: hdovd extract-clip --nouns {quote(str(out))}" in ran.out
    assert len(json.loads(out.read_text())["images"]) == 24
    (tmp_path / "words.txt").write_text("Regenschirm\nKatze\n")
    ran = hdovd(*common, tmp_path / "words.txt", "--parser", "match")
    assert ran.code == 1
    assert "are they of one language?" in ran.err


# --- the whole way ---


def test_the_main_job_by_commands(
    hdovd: Callable[..., Ran], world: Path, clip: str, tmp_path: Path, micro_settings: list[str]
) -> None:
    """propose, extract-clip, train and eval, each from what the one before wrote."""
    data = ("--data", world, "--protocol", world / "protocol.toml")
    out = tmp_path / "with space"
    proposals, cache, run = out / "proposals.json", out / "cache", out / "run"
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}\na drawing of a {}\n")

    ran = hdovd("propose", *data, "--out", proposals, "--top", 4, *micro_settings, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "hdovd extract-clip" in ran.out
    assert json.loads(proposals.read_text())

    extract = (
        "extract-clip",
        *data,
        "--cache",
        cache,
        "--clip",
        clip,
        "--proposals",
        proposals,
        "--vocabulary",
        world / "vocabulary.txt",
        "--captions",
        world / "annotations" / "captions_train2017.json",
        "--templates",
        templates,
        "--device",
        "cpu",
    )
    ran = hdovd(*extract, "--dry-run")
    assert ran.code == 0, ran.err
    assert "no cache yet" in ran.out
    assert "hdovd train" not in ran.out
    assert not cache.exists()

    ran = hdovd(*extract)
    assert ran.code == 0, ran.err
    assert f"next: hdovd train --cache {quote(str(cache))} --out" in ran.out
    assert "activation: gelu" in ran.out
    (classes,) = (cache / "class").glob("*/zarr.json")
    assert json.loads(classes.read_text())["attributes"]["key_inputs"]["templates"] == [
        "a photo of a {}",
        "a drawing of a {}",
    ]

    ran = hdovd("train", *data, "--cache", cache, "--out", run, *micro_settings, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "hdovd eval" in ran.out
    assert "instance, class, image" in ran.out

    ran = hdovd(*extract, "--features", "same")
    assert ran.code == 0, ran.err
    assert "everything is there" in ran.out
    assert f"next: hdovd train --cache {quote(str(cache))} --features same --out" in ran.out

    ran = hdovd("eval", run, "--data", world, "--per-class", "--errors", "--pictures", 1, "--device", "cpu")
    assert ran.code == 0, ran.err
    for word in (
        "novel",
        "base",
        "all",
        "split-blind",
        "demo-world",
        "umbrella",
        "localisation",
        "named novel",
        "metrics.json",
    ):
        assert word in ran.out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["cache"]["path"] == str(cache.resolve())


def test_paths_given_one_by_one(
    hdovd: Callable[..., Ran], world: Path, training_cache: Path, tmp_path: Path, micro_settings: list[str]
) -> None:
    """--images and --annotations stand in for --data; --preset is laid over the recipe."""
    pictures = Path(shutil.copytree(world / "train2017", tmp_path / "pictures"))
    annotations = Path(shutil.copy(world / "annotations" / "instances_train2017.json", tmp_path / "boxes.json"))
    words = (
        "train",
        "--images",
        pictures,
        "--annotations",
        annotations,
        "--protocol",
        world / "protocol.toml",
        "--cache",
        training_cache,
        "--out",
        tmp_path / "run",
        *micro_settings,
    )
    ran = hdovd(*words, "--preset", "base-only", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "none (base-only)" in ran.out
    again = hdovd(*words)
    assert again.code == 1
    assert "--overwrite" in again.err
