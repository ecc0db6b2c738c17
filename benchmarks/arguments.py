"""A benchmark's command line, made of the fields of its config, and a folder to work in."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints


def parsed(config: type[Any], about: str | None, words: list[str] | None = None) -> Any:
    """The config that the command line asks for: `--name value` for a field, `--no-name` for a switch, several values
    for a tuple.
    """
    parser = argparse.ArgumentParser(
        description=(about or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = (get_args(hints[field.name]) or (hints[field.name],))[0]
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if isinstance(field.default, tuple):
            how["nargs"] = "*"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=" ", **how)
    given = vars(parser.parse_args(words))
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that is deleted in the end."""
    with tempfile.TemporaryDirectory(prefix="hdovd-bench-") as place:
        yield Path(place)
