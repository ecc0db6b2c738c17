"""Help and mistakes import nothing heavy: what takes seconds to import comes after arguments, names and paths were
found right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from startup import commands, mistakes

HEAVY = {
    "PIL",
    "av",
    "fsspec",
    "google_crc32c",
    "jinja2",
    "open_clip",
    "pyarrow",
    "pycocotools",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "simplemma",
    "spacy",
    "submitit",
    "timm",
    "torch",
    "torchvision",
    "tqdm",
    "webdataset",
    "zarr",
}
# One process for all command lines: what one of them imports is told of it, and the first one is the one to mend.
RUN = """
import contextlib, io, json, sys
from hdovd.cli.main import main

heavy, lines = map(json.loads, sys.argv[1:])
heavy = set(heavy)
for words in lines:
    sys.argv = ["hdovd", *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    print(json.dumps([" ".join(words), code, said.getvalue(), sorted(heavy & sys.modules.keys())]))
    heavy -= sys.modules.keys()
"""


def _run(
    python: Callable[..., Any], folder: Path, lines: list[list[str]], heavy: set[str]
) -> list[tuple[str, int, str, list[str]]]:
    ran = python(["-c", RUN, json.dumps(sorted(heavy)), json.dumps(lines)], folder)
    assert ran.returncode == 0, ran.stderr
    found = [tuple(json.loads(line)) for line in ran.stdout.splitlines()]
    assert len(found) == len(lines)
    return found


def test_help_of_every_command(tmp_path: Path, python: Callable[..., Any]) -> None:
    every = list(commands())
    assert {(), ("train",), ("cache", "ls"), ("bench", "extract")} <= set(map(tuple, every))
    for command, code, said, heavy in _run(
        python, tmp_path, [[*words, "--help"] for words in every], {*HEAVY, "numpy"}
    ):
        assert code == 0, said
        assert said.startswith(f"Usage: hdovd {command.removesuffix('--help')}".rstrip()), said
        assert heavy == [], command


def test_mistakes(tmp_path: Path, python: Callable[..., Any]) -> None:
    wrong = mistakes(tmp_path) + [[*words, "--no-such-option"] for words in commands()]
    before = sorted(tmp_path.rglob("*"))
    for command, code, said, heavy in _run(python, tmp_path, wrong, HEAVY):
        assert code in (1, 2), command
        assert "rror: " in said, f"{command}: {said}"
        assert "unexpected" not in said, f"{command}: {said}"
        assert heavy == [], command
    assert sorted(tmp_path.rglob("*")) == before
