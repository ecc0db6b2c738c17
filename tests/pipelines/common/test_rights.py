"""What is said of files and folders that another user owns: no permission, with mode and owner; never that they are
damaged or missing.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hdovd.cache.store import LocalFolder
from hdovd.core import HdovdError, is_file, system_line
from hdovd.modeling.backbones.pyramid import _read
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.common.tensors import load_pth, load_tensors
from hdovd.pipelines.extraction.identities import read_class_embeddings
from hdovd.pipelines.proposals.networks import made_by
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.teachers.openclip import load_clip
from hdovd.pipelines.training.hooks import load_checkpoint

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may look into, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="hdovd-rights-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _said(use: Callable[[], object]) -> str:
    """What another user is told."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        use()
    except HdovdError as error:
        return str(error)
    except OSError as error:
        return system_line(error)  # as the command line says it
    finally:
        if root:
            os.seteuid(0)
    return "nothing"


READERS: dict[str, Callable[[Path], object]] = {
    "class_embeddings.safetensors": load_tensors,
    "model.safetensors": lambda file: RunFolder(file.parent).load_model(np),  # type: ignore[arg-type]  # the file comes first
    "run.json": lambda file: RunFolder(file.parent).record(),
    "checkpoint.pt": lambda file: load_checkpoint(file.parent),
    "a.oln.safetensors": made_by,
    "rows.npy": lambda file: read_class_embeddings(file, ("a",)),
    "rows.safetensors": lambda file: read_class_embeddings(file, ("a",)),
    "rows.pt": load_pth,
    "body.safetensors": _read,
    "picture.jpg": lambda file: decode(file),
    "zarr.json": lambda file: LocalFolder(file.parent).read(file.name),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read(name: str, place: Path) -> None:
    (place / name).touch(0o000 if os.geteuid() else 0o600)
    said = _said(lambda: READERS[name](place / name))
    mode = "0000" if os.geteuid() else "0600"
    assert f"no permission to read {place / name} (mode {mode}, owner {place.owner()})" in said
    assert not re.search("copied whole|damaged|no such file", said)


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_a_clip_that_may_not_be_read(name: str, place: Path) -> None:
    (place / "open_clip_config.json").write_text("{}")
    (place / "open_clip_model.safetensors").touch()
    (place / name).chmod(0o000 if os.geteuid() else 0o600)
    assert f"no permission to read {place / name} (mode 0" in _said(
        lambda: load_clip(f"local-dir:{place}", None, device="cpu")
    )


def test_a_folder_that_may_not_be_looked_into(place: Path) -> None:
    (place / "own").mkdir(mode=0o000 if os.geteuid() else 0o700)
    for use in (
        lambda: READERS["run.json"](place / "own" / "run.json"),
        lambda: is_file(str(place / "own" / "a")),
        lambda: write_text(place / "own" / "a", ""),
    ):
        assert f"no permission to read {place / 'own'} (mode 0" in _said(use)


def test_a_folder_that_may_not_be_written_to(place: Path) -> None:
    place.chmod(0o555)
    (place / "a").touch() if not os.geteuid() else None
    for file in (place / "a", place / "new" / "b"):
        said = _said(lambda file=file: write_text(file, ""))
        assert f"{file} cannot be written: no permission to write in {place} (mode 0555, owner" in said
    place.chmod(0o755)
    assert sorted(place.iterdir()) == ([place / "a"] if not os.geteuid() else [])


def test_caches_are_shared_with_a_group(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        folder = LocalFolder(tmp_path / "cache")
        with folder.claim("instance/k/0", wait=False):
            folder.write("instance/k/zarr.json", b"{}")
            (lock,) = (tmp_path / "cache" / ".claims").iterdir()
            assert lock.stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "instance" / "k" / "zarr.json").stat().st_mode & 0o777 == 0o664
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*") if path.is_dir()} == {0o775}
