"""Claims and half-written files of a local cache: who works on what, and what a dead process left."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hdovd.cache import store, store as locks
from hdovd.cache.store import CLAIMS, LocalFolder

DEAD = 2**22 + 1  # no process has this number: it is over the system's limit


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_claim_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    one, other = LocalFolder(tmp_path), LocalFolder(tmp_path)
    with one.claim("a/b/3", wait=False) as mine:
        assert mine
        with other.claim("a/b/3", wait=False) as theirs:
            assert not theirs
        with other.claim("a/b/4", wait=False) as theirs:
            assert theirs
    with other.claim("a/b/3", wait=False) as theirs:
        assert theirs
    assert _files(tmp_path) == set()


def test_never_two_hold_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the file is deleted by who had it, between another's opening and locking it."""
    monkeypatch.setattr(locks, "POLL_S", 0.0)
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(300):
            with LocalFolder(tmp_path).claim("x", wait=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_the_wait_for_a_process_that_hangs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CLAIM_WAIT_S", 0.2)
    with LocalFolder(tmp_path).claim("x", wait=False), LocalFolder(tmp_path).claim("x", wait=True) as mine:
        assert mine


def test_a_claim_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from hdovd.cache.store import LocalFolder\n"
        "with LocalFolder(Path(sys.argv[1])).claim('x', wait=False): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert _files(tmp_path) == {f"{CLAIMS}/x"}
    with LocalFolder(tmp_path).claim("x", wait=False) as mine:
        assert mine


def test_a_folder_that_takes_no_locks_gives_every_claim(tmp_path: Path) -> None:
    (tmp_path / CLAIMS).write_text("no folder")
    with LocalFolder(tmp_path).claim("x", wait=False) as mine:
        assert mine


def test_sweep_deletes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    here = socket.gethostname().replace("-", "_")
    old = time.time() - 2 * 24 * 3600
    dead, locked = f"level/key/.partial-{here}-{DEAD}-aa", f"level/.partial-{here}-{DEAD}-bb"
    living, elsewhere = f".partial-{here}-{os.getpid()}-cc", ".partial-another_machine-1-dd"
    long_ago = "level/.partial-another_machine-1-ee"
    for name in (dead, locked, living, elsewhere, long_ago, "level/key/zarr.json", f"{CLAIMS}/done", f"{CLAIMS}/held"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    os.utime(tmp_path / long_ago, (old, old))
    with (tmp_path / locked).open("rb+") as writer, LocalFolder(tmp_path).claim("held", wait=False):
        fcntl.flock(writer, fcntl.LOCK_EX)  # as `write` does, of a process in another container
        assert LocalFolder(tmp_path).sweep() == sorted([dead, long_ago])
        assert _files(tmp_path) == {locked, living, elsewhere, "level/key/zarr.json", f"{CLAIMS}/held"}


def test_an_object_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path)
    assert folder.write("a/b", b"first", exclusive=True)
    assert not folder.write("a/b", b"second", exclusive=True)
    assert folder.read("a/b") == b"first"
    assert folder.write("a/b", b"third")
    assert folder.read("a/b") == b"third"
    assert _files(tmp_path) == {"a/b"}
