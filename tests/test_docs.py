"""The pages: links lead somewhere, files that they name are there, and every name of the API page says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "API.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [
        target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in target
    ]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:hdovd|pipelines|cache|cli|tests|benchmarks|docs)/[\w./-]+\.(?:py|md|toml|txt))`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name and "FILE" not in name] == []


def test_the_architecture_names_files_below_a_floor() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "ARCHITECTURE.md").read_text()))
    assert [
        name for name in named if not any((ROOT / floor / name).exists() for floor in ("", "hdovd", "pipelines"))
    ] == []


def _named(dotted: str) -> object:
    module, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_say_what_they_are(name: str) -> None:
    found = _named(name)
    assert found.__doc__
    if inspect.isclass(found):
        own = {
            key: value
            for key, value in vars(found).items()
            if not key.startswith("_") and inspect.isfunction(inspect.unwrap(value))
        }
        assert [key for key, value in own.items() if not value.__doc__] == []
    if inspect.ismodule(found):
        functions = inspect.getmembers(found, lambda member: inspect.isfunction(member) and member.__module__ == name)
        assert [key for key, value in functions if not key.startswith("_") and not value.__doc__] == []
