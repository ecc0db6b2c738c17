"""How a command ends that is interrupted, or whose standard streams are not what they should be: no traceback, and a
shell's exit codes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

HDOVD = (sys.executable, "-m", "hdovd")
KILLS_ITSELF = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\n"
SWALLOWS_IT = f"try:\n{indent(KILLS_ITSELF, '    ')}except BaseException:\n    pass\nraise ImportError\n"


def _heard() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, tests among them, ignores it


def _run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    given = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "preexec_fn": _heard,
    }
    return subprocess.run([*HDOVD, *map(str, words)], **(given | options))


@pytest.fixture
def broken_pipe() -> Any:
    """What writes to a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("--version",), ("runs", "{out}")], ids=" ".join)
def test_nobody_reads_what_is_printed(words: tuple[str, ...], broken_pipe: int, tmp_path: Path) -> None:
    """As in `hdovd ... | head -1`; exit code 1 of `cache verify` would mean findings."""
    ran = _run(*(word.format(out=tmp_path) for word in words), stdout=broken_pipe)
    assert ran.returncode == 141
    assert "Error" not in ran.stderr
    assert "Traceback" not in ran.stderr


def test_nobody_reads_an_error(broken_pipe: int, tmp_path: Path) -> None:
    for words in (("no-such-command",), ("eval", "nowhere", "--data", ".")):
        assert _run(*words, stderr=broken_pipe, cwd=tmp_path).returncode == 141


def test_no_room_for_what_is_printed() -> None:
    with open("/dev/full", "w") as full:
        ran = _run("--help", stdout=full)
    assert (ran.returncode, ran.stderr) == (1, "error: No space left on device (make room)\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, world: Path, tmp_path: Path) -> None:
    """Not a number of theirs is taken by a file that is written."""
    command = f'"{sys.executable}" -m hdovd "$@" {closed}'
    words = (
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
    )
    ran = subprocess.run(
        ["sh", "-c", command, "sh", *map(str, words), str(tmp_path / "a.json")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ("next: hdovd" in ran.stdout) == (" >&-" not in f" {closed}")
    assert (tmp_path / "a.json").read_text().startswith('{"format": "hdovd nouns"')


@pytest.mark.parametrize(
    ("module", "content", "code", "said"),
    [
        ("logging", KILLS_ITSELF, -signal.SIGINT, ""),
        ("typer", KILLS_ITSELF, -signal.SIGINT, ""),
        ("pydantic", KILLS_ITSELF, 130, "stopped\n"),
        ("pydantic", SWALLOWS_IT, 130, "stopped\n"),
    ],
    ids=["in the package itself", "before there is a command line", "within a command", "swallowed by a module"],
)
def test_interrupted_while_modules_are_imported(
    module: str, content: str, code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text(content)
    ran = _run(
        "train",
        "--cache",
        "c",
        "--out",
        "o",
        "--data",
        ".",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", said)


def test_a_background_job_ignores_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(f"{KILLS_ITSELF}print('it lives')\nimport sys\nsys.exit(7)")
    ran = _run(
        "train",
        "--cache",
        "c",
        "--out",
        "o",
        "--data",
        ".",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (ran.returncode, ran.stdout) == (7, "it lives\n")
