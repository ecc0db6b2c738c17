"""Files that appear whole or not at all, whatever goes wrong; and that nothing else writes files."""

from __future__ import annotations

import ast
import gc
import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hdovd
from hdovd.core import HdovdError
from hdovd.pipelines.common.atomic_write import replace_file, write_picture, write_text, writing
from hdovd.pipelines.export.model import save_traced

BIG = torch.zeros(100_000)
NOISE = Image.effect_noise((600, 600), 100)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda file: write_text(file, "x" * 400_000),
    "picture": lambda file: write_picture(file, NOISE, "PNG"),
    "safetensors": lambda file: replace_file(file, lambda partial: save_file({"a": BIG}, partial)),
    "torch": lambda file: replace_file(file, lambda partial: torch.save({"a": BIG}, partial)),
    "torchscript": lambda file: replace_file(file, lambda partial: save_traced(_traced(), partial, {})),
}


def _traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of TorchScript deprecated
        return torch.jit.trace(torch.nn.Linear(300, 300).eval(), torch.zeros(300))


@contextmanager
def _limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("form", WRITERS)
def test_a_full_disk_leaves_what_was_there(form: str, small_disk: Path) -> None:
    file = small_disk / "a.json"
    file.write_text("of before")
    with pytest.raises(
        HdovdError, match=r"a\.json cannot be written: No space left on device \(make room\); what was there is whole"
    ):
        WRITERS[form](file)
    assert {entry.name: entry.read_text() for entry in small_disk.iterdir()} == {"a.json": "of before"}
    gc.collect()  # Python 3.13: torch's writer, and with it the deleted file, is in a circle of its error
    assert shutil.disk_usage(small_disk).free > 50_000


@pytest.mark.parametrize("form", WRITERS)
def test_a_file_that_may_not_grow_leaves_what_was_there(form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("of before")
    with _limit(50_000), pytest.raises(HdovdError, match=r"a\.json cannot be written: .*what was there is whole"):
        WRITERS[form](file)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.json": "of before"}


def test_a_read_only_file_system_is_named(small_disk: Path) -> None:
    """And the partial file that cannot be deleted there hides nothing."""
    (small_disk / "a.json").write_text("of before")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(
        HdovdError, match=r"a\.json cannot be written: Read-only file system \(give a place that can be written to\)"
    ):
        write_text(small_disk / "a.json", "new")
    with pytest.raises(HdovdError, match=r"b/c/a\.json cannot be written: Read-only file system"):
        write_text(small_disk / "b" / "c" / "a.json", "new")
    assert (small_disk / "a.json").read_text() == "of before"


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(HdovdError, match=rf"a/b/c\.json cannot be written: {tmp_path}/a is a file, expected a folder"):
        write_text(tmp_path / "a" / "b" / "c.json", "new")
    with pytest.raises(HdovdError, match="cannot be written: Is a directory"):
        write_text(tmp_path, "new")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for form, write in WRITERS.items():
            write(tmp_path / form / "file")
    finally:
        os.umask(before)
    assert {(tmp_path / form / "file").stat().st_mode & 0o777 for form in WRITERS} == {0o666 & ~mask}
    assert {(tmp_path / form).stat().st_mode & 0o777 for form in WRITERS} == {0o777 & ~mask}
    assert load_file(tmp_path / "safetensors" / "file")["a"].shape == BIG.shape


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("new", "newer"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "file").read_text() == text
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "link", "pipe"]


def test_names_as_long_as_they_may_be(tmp_path: Path) -> None:
    for letter in ("a", "\N{SNOWMAN}"):
        file = tmp_path / (letter * (255 // len(letter.encode())))
        write_text(file, "whole")
        assert file.read_text() == "whole"
    with pytest.raises(HdovdError, match=r"File name too long \(a name has at most 255 bytes"):
        write_text(tmp_path / ("a" * 256), "new")


def test_what_goes_wrong_while_writing_is_told_once(tmp_path: Path) -> None:
    def fail(error: Exception) -> Callable[[Path], object]:
        def write(partial: Path) -> None:
            partial.write_text("half")
            raise error

        return write

    with pytest.raises(HdovdError, match=r"^the file is not what it should be$"):
        replace_file(tmp_path / "a", fail(HdovdError("the file is not what it should be")))
    with pytest.raises(HdovdError, match="cannot be written: out of luck"):
        replace_file(tmp_path / "a", fail(RuntimeError("out of luck")))
    with pytest.raises(HdovdError, match="log cannot be written: No space left"), writing(tmp_path / "log"):
        (Path("/dev/full")).write_text("line")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_while_a_file_is_written_is_told(tmp_path: Path) -> None:
    def write(_: Path) -> None:
        shutil.rmtree(tmp_path / "folder")
        raise RuntimeError("it broke")

    with pytest.raises(HdovdError, match="it broke"):
        replace_file(tmp_path / "folder" / "file", write)


# --- no other writers ---

CALLS = {
    "write_text",
    "write_bytes",
    "save",
    "savez",
    "savez_compressed",
    "tofile",
    "save_file",
    "mkstemp",
    "NamedTemporaryFile",
}
OF_MODULES = {
    ("json", "dump"),
    ("pickle", "dump"),
    ("os", "replace"),
    ("os", "rename"),
    ("shutil", "copy"),
    ("shutil", "copyfile"),
    ("shutil", "copy2"),
    ("shutil", "move"),
    ("onnx", "export"),
}
OWN = {"replace_file", "write_text", "write_picture"}
ALLOWED = {
    "pipelines/common/atomic_write.py": "the one place",
    "hdovd/data/forms/conversion.py converted": "below pipelines: written in a folder of its own, and named when whole",
    "pipelines/extraction/forecast.py": "made-up data for measurements, deleted after them",
    "cache/store.py write": "the cache's own place: whole or absent, and safe beside other processes",
    "cache/store.py _link": "of it",
    "cache/hub.py _lay": "what was pulled, under its name when whole",
    "cache/store.py _lock": "a lock has no content",
    "cache/store.py is_stale": "opens what it locks",
    "pipelines/ablation/ablate.py _locked": "a lock has no content",
    "pipelines/runs/folder.py log": "a log that grows; its last line may be torn",
    "pipelines/runs/folder.py synced_log_bytes": "of it",
    "pipelines/runs/folder.py cut_log": "of it",
    "pipelines/common/process.py _run": "a log that grows",
    "pipelines/detection/detect.py __init__": "a log that grows, and goes in the end",
    "pipelines/detection/detect.py _write": "given to replace_file",
    "pipelines/proposal_files/file.py _write_json": "given to replace_file",
    "pipelines/proposal_files/file.py _write_npz": "given to replace_file",
    "pipelines/detection/video.py": "grows, frame by frame, and can be played at any time",
    "pipelines/extraction/pseudo_labels.py write": "given to replace_file",
    "pipelines/export/model.py _write_onnx": "given to replace_file",
    "pipelines/export/model.py save_traced": "given to replace_file",
    "pipelines/export/model.py _write_safetensors": "given to replace_file",
    "pipelines/common/tensors.py save_tensors": "given to replace_file",
    "cache/picture_files.py write_files": "in memory",
    "cache/tar_shards.py to_bytes": "in memory",
    "cache/tar_shards.py write": "in memory",
    "pipelines/common/pages.py picture_data": "in memory",
}


def _writes(call: ast.Call) -> bool:
    name = (
        call.func.attr
        if isinstance(call.func, ast.Attribute)
        else call.func.id
        if isinstance(call.func, ast.Name)
        else ""
    )
    if isinstance(call.func, ast.Attribute):
        owner = call.func.value
        last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if (last, name) in OF_MODULES:
            return True
    elif name in OWN:
        return False
    if name == "open":
        words = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        modes = [
            word.value
            for word in words
            if isinstance(word, ast.Constant) and isinstance(word.value, str) and len(word.value) <= 3
        ]
        return any(set("wax+") & set(mode) for mode in modes)
    return name in CALLS


def _writers(tree: ast.AST, function: str = "", *, inside: bool = False) -> Iterator[tuple[str, int]]:
    """The function and the line of every call that writes a file, and is no argument of `replace_file`."""
    if isinstance(tree, ast.FunctionDef):
        function = tree.name
    if isinstance(tree, ast.Call):
        if not inside and _writes(tree):
            yield function, tree.lineno
        inside = inside or (isinstance(tree.func, ast.Name) and tree.func.id in OWN)
    for child in ast.iter_child_nodes(tree):
        yield from _writers(child, function, inside=inside)


def test_the_walk_finds_writers() -> None:
    text = (
        "def f(p):\n p.write_text('')\n open(p, 'w')\n p.open(mode='ab')\n json.dump(1, p)\n np.save(p, 1)\n "
        "torch.onnx.export(1)\n"
        " p.open()\n open(p, 'rb')\n write_text(p, '')\n replace_file(p, lambda q: q.write_bytes(b''))\n "
        "'a'.replace('b', 'c')\n"
    )
    assert list(_writers(ast.parse(text))) == [("f", line) for line in range(2, 8)]


def test_every_file_is_written_through_here() -> None:
    """A new writer goes through `replace_file`, `write_text` or `write_picture`; or into the list above, with its
    reason.
    """
    root, used, others = Path(hdovd.__file__).parents[1], set(), []
    for file in sorted(
        path for place in ("cli", "cache", "hdovd", "pipelines") for path in (root / place).rglob("*.py")
    ):
        name = file.relative_to(root).as_posix()
        if name.startswith(("hdovd/cli/", "hdovd/cache/", "hdovd/pipelines/")):  # links
            continue
        for function, line in _writers(ast.parse(file.read_text())):
            reason = next(
                (key for key in ALLOWED if f"{name} {function}" == key or name == key or name.startswith(key)), None
            )
            used.add(reason)
            if reason is None:
                others.append(f"{name}:{line} in {function}")
    assert others == []
    assert set(ALLOWED) == used


def test_a_file_that_another_process_deletes_meanwhile_is_written_whole_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone after it was first looked at; it must not pass for a pipe, which is written to in place."""
    file, look, written = tmp_path / "rows", os.stat, list[Path]()
    file.write_text("before")

    def looked_at(path: object, *rest: object, **more: object) -> os.stat_result:
        found = look(path, *rest, **more)  # type: ignore[call-overload]
        if path == file:
            file.unlink(missing_ok=True)
        return found

    def write(partial: Path) -> None:
        written.append(partial)
        partial.write_text("after")

    monkeypatch.setattr(os, "stat", looked_at)
    replace_file(file, write)
    monkeypatch.undo()
    assert written != [file]
    assert file.read_text() == "after"
