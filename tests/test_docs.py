"""The pages: links lead somewhere, files that they name are there, and every name of the API page says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from hdovd.cli.main import app

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


# --- docs/CLUSTERS.md: what is to be copied ---

CLUSTERS = (ROOT / "docs" / "CLUSTERS.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", CLUSTERS, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """Whole lines of `hdovd extract-clip`, with what they would stand for in a job."""
    text = CLUSTERS.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "0/8")
    plain = re.search(r"    (hdovd extract-clip --data.*)", text)
    assert plain
    found = re.findall(r"hdovd extract-clip [^\n'`]*", text.replace("hdovd extract-clip ...", plain[1]))
    return [line for line in found if "--clip" in line]


def test_commands_for_clusters_are_ones_that_the_command_line_takes() -> None:
    group, seen = get_command(app), []
    for line in _commands():
        words = shlex.split(line, comments=True)[1:]
        with group.make_context("hdovd", list(words)) as context:
            command = group.get_command(context, words[0])  # type: ignore[attr-defined]
            seen.append(command.make_context(words[0], words[1:], parent=context).params)
    assert {str(params["executor"]) for params in seen} == {"local", "ray", "submitit"}
    assert {params["share"] for params in seen} >= {"0/8"}


def test_the_cluster_of_ray_is_whole() -> None:
    (block,) = _blocks("yaml")
    cluster = yaml.safe_load(block)
    assert cluster["provider"]["type"] == "local"
    assert {cluster["provider"]["head_ip"], *cluster["provider"]["worker_ips"]} >= {"192.0.2.10", "192.0.2.11"}
    assert cluster["docker"]["image"] == "hdovd:cuda"
    assert "--tag hdovd:cuda" in (ROOT / "Dockerfile").read_text()
    assert any("ray start --head" in command for command in cluster["head_start_ray_commands"])
    assert any("$RAY_HEAD_IP" in command for command in cluster["worker_start_ray_commands"])


def test_the_settings_of_submitit_are_ones_that_it_takes(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    (block,) = _blocks("toml")
    settings = tomllib.loads(block)
    assert {settings.pop("jobs"), settings.pop("folder")} == {8, "/shared/logs/clip-cache"}
    submitit.AutoExecutor(tmp_path, "local").update_parameters(**settings)
    with pytest.raises(NameError):
        submitit.AutoExecutor(tmp_path, "local").update_parameters(**settings, slurm_acount=1)
