"""How tests of commands run them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from command_runs import Ran

from hdovd.cli.main import main


@pytest.fixture
def hdovd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command line in this process, through the same `main` as the installed command."""

    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hdovd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        found = capsys.readouterr()
        return Ran(code, found.out, found.err)

    return run
