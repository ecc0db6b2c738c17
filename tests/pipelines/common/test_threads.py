"""Cores and threads: quotas of cgroups as files, and what a process of its own comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdovd.pipelines.common.process import cgroup_quota, limit_threads, usable_cores


def _cgroup(root: Path, group: str, **files: str) -> None:
    (root / group).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / group / name.replace("__", ".")).write_text(text)


def test_quotas_of_version_2(tmp_path: Path) -> None:
    table, root = tmp_path / "cgroup", tmp_path / "fs"
    table.write_text("0::/slurm/job/step\n")
    assert cgroup_quota(table, root) == float("inf")
    _cgroup(root, "slurm/job/step", cpu__max="max 100000\n")
    assert cgroup_quota(table, root) == float("inf")
    _cgroup(root, "slurm/job", cpu__max="250000 100000\n")
    assert cgroup_quota(table, root) == 2.5
    _cgroup(root, "", cpu__max="50000 100000\n")  # as a container sees its own
    assert cgroup_quota(table, root) == 0.5


def test_quotas_of_version_1(tmp_path: Path) -> None:
    table, root = tmp_path / "cgroup", tmp_path / "fs"
    table.write_text("9:name=systemd:/\n4:memory:/a\n3:cpu,cpuacct:/docker/7\n0::/\n")
    _cgroup(root, "cpu,cpuacct/docker/7", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert cgroup_quota(table, root) == float("inf")
    _cgroup(root, "cpu,cpuacct/docker/7", cpu__cfs_quota_us="400000\n", cpu__cfs_period_us="100000\n")
    _cgroup(root, "memory/a", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert cgroup_quota(table, root) == 4.0


def test_where_there_are_no_cgroups(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "none", tmp_path) == float("inf")


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"), [(8, float("inf"), 8), (64, 2.5, 3), (2, 16.0, 2), (4, 0.3, 1)]
)
def test_usable_cores(affinity: int, quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr("hdovd.pipelines.common.process.cgroup_quota", lambda: quota)
    assert usable_cores() == expected


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdovd.pipelines.common.process.usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert limit_threads() is None
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("3", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert limit_threads() == "note: OMP_NUM_THREADS=64, and this process may use 4 cores: more threads are slower"


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hdovd.pipelines.common.process.usable_cores", lambda: 8)
    for processes, threads in (("4", "2"), ("16", "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert limit_threads() is None
        assert os.environ["OMP_NUM_THREADS"] == threads


def test_a_command_on_one_core_has_one_thread() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import sys; sys.argv = ['hdovd', "
        "'--version']\nfrom hdovd.cli.main import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "import torch; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 passive"
