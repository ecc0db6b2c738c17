"""Caches on a file system: the contract by path and by file:// URL, and what only file systems have."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_contract import StoreContract, begin, contents, ragged, write_parts

from hdovd.cache.store import PARTIAL, LocalFolder, open_folder
from hdovd.core import HdovdError

ODD = "a cache [1] 100%25 ü"


class TestLocalPath(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / ODD)


class TestFileUrl(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/a cache [1]"

    def test_it_is_the_folder_of_that_path(self, tmp_path: Path) -> None:
        for url in ((tmp_path / ODD).as_uri(), f"file://localhost{(tmp_path / ODD).as_uri()[7:]}"):
            open_folder(url).write("a", b"1")
            assert (tmp_path / ODD / "a").read_bytes() == b"1"

    @pytest.mark.parametrize("url", ["file://data/cache", "file://machine"])
    def test_another_machines_is_refused(self, url: str) -> None:
        with pytest.raises(HdovdError, match="three slashes"):
            open_folder(url)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / ODD)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_file_system_without_hard_links(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    assert folder.write("a", b"first", exclusive=True)
    assert not folder.write("a", b"second", exclusive=True)
    arrays = ragged((3, 0, 6))
    assert write_parts(begin(folder, arrays), arrays).whole
    assert folder.read("a") == b"first"
    assert not [path for path in folder.root.rglob("*") if path.name.startswith(PARTIAL)]


def test_file_system_without_locks(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without -o flock: everybody may do everything, which is double work at worst."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with folder.claim("instance/k/0", wait=False) as mine, folder.claim("instance/k/0", wait=False) as other:
        assert mine
        assert other
        assert folder.write("a", b"1")
    assert contents(folder) == {"a": b"1"}


def test_a_claim_is_held_against_other_processes_and_ends_with_them(folder: LocalFolder) -> None:
    script = (
        "import sys; from hdovd.cache.store import open_folder\n"
        "with open_folder(sys.argv[1]).claim('instance/k/0', wait=False) as mine: print(mine, flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, folder.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with folder.claim("instance/k/0", wait=False) as mine, folder.claim("instance/k/1", wait=False) as another:
            assert not mine
            assert another
        other.kill()
    with folder.claim("instance/k/0", wait=True) as mine:
        assert mine


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(folder: LocalFolder) -> None:
    folder.write("a", b"1")
    folder.root.chmod(0o500)
    with pytest.raises(HdovdError, match=r"cannot be written: no permission to write in .*mode 0500, owner"):
        folder.write("b", b"1")


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = LocalFolder(tmp_path / "file")
    assert not folder.exists("zarr.json")
    for use in (lambda: folder.read("zarr.json"), lambda: folder.write("zarr.json", b"")):
        with pytest.raises(HdovdError, match=r"file/zarr\.json cannot be"):
            use()
