"""Commands side by side: order, logs, places, and that nothing is left when they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.common.process import Job, StopSignal, log_end, run_jobs

# for a file, half a minute at most
WAIT = 'i=0; while [ ! -e "{0}" ]; do sleep 0.02; i=$((i+1)); [ $i -lt 1500 ] || exit 9; done; '


def _job(folder: Path, name: str, *scripts: str) -> Job:
    return Job(name, tuple(("sh", "-c", script) for script in scripts), folder / "logs" / f"{name}.log")


def _run(jobs: list[Job], places: list[dict[str, str]]) -> dict[str, tuple[tuple[str, ...], int]]:
    """The last command of each job, and its exit code."""
    ended: dict[str, tuple[tuple[str, ...], int]] = {}

    def on_end(job: Job, command: tuple[str, ...], code: int, _: float) -> None:
        ended[job.name] = command, code

    run_jobs(jobs, places, on_end, StopSignal())
    return ended


def test_commands_run_in_order_until_one_fails(tmp_path: Path) -> None:
    jobs = [
        _job(tmp_path, "good", "echo first", "echo second >&2"),
        _job(tmp_path, "bad", "echo broken; exit 3", "touch never"),
    ]
    ended = _run(jobs, [{}])
    assert ended == {"good": (jobs[0].commands[1], 0), "bad": (jobs[1].commands[0], 3)}
    assert jobs[0].log.read_text().splitlines() == [
        "$ sh -c 'echo first'",
        "first",
        "$ sh -c 'echo second >&2'",
        "second",
    ]
    assert log_end(jobs[1].log).splitlines()[1:] == ["    $ sh -c 'echo broken; exit 3'", "    broken"]
    _run(jobs[:1], [{}])
    assert jobs[0].log.read_text().count("first") == 4  # a second attempt is added


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.log").symlink_to("/dev/full")
    with StopSignal() as stop, pytest.raises(HdovdError, match=r"a\.log cannot be written: No space left on device"):
        run_jobs([Job("a", (("true",),), tmp_path / "a.log")], [{}], lambda *_: None, stop)


def test_each_place_holds_one_job_at_a_time_and_all_places_are_used(tmp_path: Path) -> None:
    alone = f'cd "{tmp_path}" && mkdir at-$PLACE && echo $PLACE >> used && sleep 0.1 && rmdir at-$PLACE'
    meets = [
        f'touch "{tmp_path}/{me}"; ' + WAIT.format(tmp_path / other) + alone for me, other in (("a", "b"), ("b", "a"))
    ]
    jobs = [_job(tmp_path, f"job{i}", script) for i, script in enumerate([*meets, alone, alone, alone])]
    ended = _run(jobs, [{"PLACE": "zero"}, {"PLACE": "one"}])
    assert [ended[job.name][1] for job in jobs] == [0] * 5, [job.log.read_text() for job in jobs]
    assert set((tmp_path / "used").read_text().split()) == {"zero", "one"}


def test_stopped_jobs_may_save_and_none_is_begun_after(tmp_path: Path) -> None:
    saving = f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    jobs = [
        _job(tmp_path, "first", WAIT.format(tmp_path / "ready")),
        _job(tmp_path, "saving", saving),
        _job(tmp_path, "third", "true"),
    ]
    stop, ended = StopSignal(), list[str]()

    def on_end(job: Job, *_: object) -> None:
        ended.append(job.name)
        stop.signals.append(signal.SIGTERM)

    run_jobs(jobs, [{}, {}], on_end, stop)
    assert ended == ["first"]
    assert (tmp_path / "saved").exists()
    assert not jobs[2].log.exists()


def test_a_second_signal_kills_with_all_children(tmp_path: Path) -> None:
    stubborn = (
        f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    )
    jobs = [_job(tmp_path, "first", WAIT.format(tmp_path / "ready")), _job(tmp_path, "stubborn", stubborn)]
    stop = StopSignal()
    run_jobs(jobs, [{}, {}], lambda *_: stop.signals.extend([signal.SIGINT, signal.SIGINT]), stop)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def test_an_error_while_jobs_run_leaves_none(tmp_path: Path) -> None:
    jobs = [
        _job(tmp_path, "first", WAIT.format(tmp_path / "ready")),
        _job(tmp_path, "long", f"echo $$ > {tmp_path}/pid; touch {tmp_path}/ready; exec sleep 600"),
    ]

    def on_end(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_jobs(jobs, [{}, {}], on_end, StopSignal())
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_signals_are_collected_and_handlers_come_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        ours = signal.getsignal(signal.SIGTERM)
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == ours
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_progress_bars_end_as_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x\n" * 20_000 + b"step 1\rstep 2\n\nlast \xff\n")
    assert log_end(log, 3).splitlines()[1:] == ["    step 1", "    step 2", "    last \ufffd"]


def test_descriptors_are_held_by_the_jobs(tmp_path: Path) -> None:
    """What a lock needs to outlive this process."""
    with (tmp_path / "held").open("w") as file:
        ended: list[int] = []
        code = f"import os; os.fstat({file.fileno()})"
        run_jobs(
            [Job("a", ((sys.executable, "-c", code),), tmp_path / "a.log")],
            [{}],
            lambda job, command, code, seconds: ended.append(code),
            StopSignal(),
            [file.fileno()],
        )
    assert ended == [0]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
