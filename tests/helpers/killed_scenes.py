"""Extractions that are killed, or have no room. `test_killed_extraction` plays these scenes and judges what they
saw."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from forked_extractions import Body, Child, Extractions, Facts, Interrupted, damaged, digests

NO_MOUNT = 77
MS_REMOUNT, MS_REC, MS_PRIVATE = 32, 1 << 14, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
WRITING = {"os.rename", "os.link", "os.mkdir", "os.remove"}


def killed_at_random(all_of: Extractions) -> Facts:
    """The command, killed after random times, resumed until it ends; and again in other folders."""
    rng, facts = random.Random(7), Facts(kills=0, early=0, damaged=[], whole=0, same=0)
    while facts["kills"] < 6:
        cache = all_of.folder(f"random {facts['whole']}")
        while True:
            child = Child(all_of.command(cache))
            time.sleep(rng.uniform(0, all_of.seconds))
            child.kill()
            code = child.wait()
            facts["damaged"] += damaged(cache)
            if code != -signal.SIGKILL:
                assert code == 0, child.printed()
                break
            facts["kills"] += 1
            facts["early"] += not cache.exists()
        facts["whole"] += 1
        facts["same"] += all_of.same(cache)
    return facts


def killed_at_a_write(all_of: Extractions) -> Facts:
    """Killed just before the n-th thing that it does to a file of the cache, n growing and shrinking, resumed until it
    ends.
    """
    facts = Facts(kills=0, without_root=0, without_tables=0, with_partial=0, damaged=[])
    rng, cache = random.Random(1), all_of.folder("write")
    steps = iter([3, 17, 30, 45])  # while the cache itself is being made; then anywhere
    while True:
        n = next(steps, rng.randrange(5, 250))
        child = Child(all_of.function(cache, before=lambda n=n: _die_before(n, cache)))
        code = child.wait()
        facts["damaged"] += damaged(cache)
        if code != -signal.SIGKILL:
            assert code == 0, child.printed()
            break
        facts["kills"] += 1
        facts["without_root"] += not (cache / "zarr.json").exists()
        facts["without_tables"] += any(
            not (p.parent / "parts" / "tables.json").exists() for p in cache.glob("*/*/zarr.json")
        )
        facts["with_partial"] += any(cache.rglob(".partial-*"))
    return facts | Facts(same=all_of.same(cache))


def killed_while_retrying(all_of: Extractions) -> Facts:
    """Pictures that could not be read are whole again; `--retry-failed` is killed, and killed again, until it ends."""
    here = copy.copy(all_of)
    world = Path(shutil.copytree(all_of.tree["data"]["root"], all_of.folder("world")))
    here.tree = all_of.tree | {"data": {"root": str(world), "images": None, "annotations": None}}
    fresh, cache, facts = here.folder("retry fresh"), here.folder("retry"), Facts(kills=0, damaged=[])
    assert Child(here.function(fresh)).wait() == 0
    pictures = {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in sorted((world / "train2017").iterdir())[1::5]
    }
    for file, (data, _) in pictures.items():
        file.write_bytes(data[:99])
    assert Child(here.function(cache)).wait() == 0
    facts["failed"] = sum(len(json.loads(file.read_text())["failed"]) for file in cache.rglob("parts/*.json"))
    for file, (data, modified) in pictures.items():
        file.write_bytes(data)
        os.utime(file, ns=(modified, modified))  # which the cache keeps
    rng = random.Random(3)
    while True:
        n = rng.randrange(2, 120)
        child = Child(here.function(cache, before=lambda n=n: _die_before(n, cache), retry_failed=True))
        code = child.wait()
        facts["damaged"] += damaged(cache)
        if code != -signal.SIGKILL:
            break
        facts["kills"] += 1
    return facts | Facts(code=code, printed=child.printed(), same=digests(cache) == digests(fresh))


def _die_before(n: int, cache: Path) -> None:
    """SIGKILL this process just before its n-th change of a file of the cache; claims do not count."""
    left = n

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "fcntl.flock":
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
            counts = "/.partial-" in path
        elif event in WRITING or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else ""
            counts = str(path).startswith(str(cache))
        else:
            return
        if counts and "/.claims" not in path:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_with_a_worker(all_of: Extractions) -> Facts:
    """Killed in the middle of a part while its DataLoader worker lives: are its claims free at once?"""
    cache, whole = all_of.folder("worker"), all_of.folder("worker unbroken")
    assert Child(all_of.command(whole, "--part-rows", "256")).wait() == 0

    def die() -> None:
        print("children", Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    child = Child(all_of.function(cache, Interrupted(all_of.teacher, 8, die), workers=1, part_rows=256))
    code = child.wait()
    orphans = child.printed().rpartition("children")[2].split()
    claims = sorted((cache / ".claims").glob("*"))
    free = 0
    for claim in claims:
        with claim.open("r+") as handle, contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free += 1
    alive = [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
    facts = Facts(code=code, alive=len(alive), claims=len(claims), free=free, damaged=damaged(cache))
    again = Child(all_of.command(cache, "--part-rows", "256", "--workers", "1"))
    return facts | Facts(again=again.wait(), same=digests(cache) == digests(whole))


def too_long_a_file(all_of: Extractions) -> Facts:
    """No file may grow over 5,000 bytes: the tables and the texts fit, a part of 128 crops does not."""
    cache, whole = all_of.folder("limit"), all_of.folder("limit unbroken")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))

    def command(folder: Path, before: Body = lambda: None) -> Body:
        run = all_of.command(folder, "--part-rows", "128")
        return lambda: (before(), run())

    assert Child(command(whole)).wait() == 0
    first, facts = Child(command(cache, limit)), Facts()
    facts |= {
        "code": first.wait(),
        "printed": first.printed(),
        "damaged": damaged(cache),
        "kept": len(list(cache.rglob("parts/*.json"))),
    }
    second = Child(command(cache))
    return facts | {"again": second.wait(), "same": digests(cache) == digests(whole)}


def full_disk(all_of: Extractions) -> Facts:
    """A file system of 500 kB, made larger after the error. Needs the right to mount, at least in a namespace of its
    own.
    """
    disk = all_of.folder("disk")
    disk.mkdir()
    libc, results = ctypes.CDLL(None, use_errno=True), all_of.folder("disk.json")

    def mount(flags: int, options: bytes) -> None:
        if libc.mount(b"none", os.fsencode(disk), b"tmpfs", flags, options):
            raise SystemExit(NO_MOUNT)

    def fill() -> Facts:
        child = Child(all_of.command(disk / "cache"))
        return Facts(
            code=child.wait(),
            printed=child.printed(),
            damaged=damaged(disk / "cache"),
            kept=len(list((disk / "cache").rglob("parts/*.json"))),
        )

    def scene() -> None:
        _own_mounts(libc)
        mount(0, b"size=500k")
        first = fill()
        mount(MS_REMOUNT, b"size=16m")
        results.write_text(json.dumps(Facts(first=first, second=fill(), same=all_of.same(disk / "cache"))))

    outer = Child(scene)
    code = outer.wait()
    assert code in (0, NO_MOUNT), outer.printed()
    return Facts(skipped="mounts are not allowed here") if code else dict(json.loads(results.read_text()))


def _own_mounts(libc: ctypes.CDLL) -> None:
    """What this process mounts is seen by it and its children alone, and gone with them."""
    user, group, root = os.getuid(), os.getgid(), os.geteuid() == 0
    if libc.unshare(CLONE_NEWNS if root else CLONE_NEWNS | CLONE_NEWUSER):
        raise SystemExit(NO_MOUNT)
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)


SCENES = (killed_at_random, killed_at_a_write, killed_while_retrying, killed_with_a_worker, too_long_a_file, full_disk)
