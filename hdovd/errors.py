"""The one exception that users see: `cli` prints its text without a traceback."""

from __future__ import annotations

from pathlib import Path


class HdovdError(Exception):
    """Bad input. The text names the file and id, what was expected, what was found and what to do."""


class Stopped(HdovdError):
    """A signal ended the work: it was saved and can go on. `code`: the exit code of a command that ends so."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def shorten(items: list[object], most: int = 8) -> str:
    """`items` in one line, cut after `most` with a count of the rest."""
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def require_files(**options: Path | None) -> None:
    """Raises HdovdError for a file that is not there, named by the option that it was given with."""
    for name, file in options.items():
        if file is not None and not file.is_file():
            raise HdovdError(f"--{name.replace('_', '-')}: no file {file}")
