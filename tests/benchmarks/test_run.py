"""`benchmarks/run.py`: it knows every benchmark, its command lines are those that they take, and the made-up world is
as asked.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import run
from arguments import parsed
from forked_group import ranks

from hdovd.pipelines.extraction.forecast import make_world

FOLDER = Path(run.__file__).parent
NOT_RUN = {
    "run",
    "arguments",
    "memory_limit",
    "online_clip",
    "other_world",
    "scene_world",
    "lvis_world",
    "swapped_labels",
    "release",
    "release_smoke",
}


@dataclass(frozen=True)
class Bench:
    images: int = 4
    folder: Path | None = None
    picture: tuple[int, ...] = (640, 480)
    online: bool = True


def test_every_benchmark_is_run() -> None:
    assert set(run.SMALL) == {file.stem for file in FOLDER.glob("*.py")} - NOT_RUN


def test_a_name_that_is_none_is_refused() -> None:
    for words in (["bench_eval", "bench_speed"], ["bench_eval", "bench_cache", "--rounds", "2"], ["--rounds", "2"]):
        with pytest.raises(
            SystemExit, match=f"expected names of benchmarks, or one with its options: bench_cache, .*found {words[0]}"
        ):
            run.main(words)


def test_a_benchmark_prints_what_it_measured_and_failures_count(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SMALL", {"bench_eval": "--images 20 --objects 60", "bench_cache": "--no-such-option"})
    monkeypatch.setattr(run, "tiny_clip", lambda folder: "clip")
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):  # which it sets for the processes that it starts
        monkeypatch.setenv(name, os.environ[name])
    assert run.main([]) == 1
    assert "\n20 images, 65 classes, 60 objects" in capfd.readouterr().out
    assert run.main(["bench_eval", "--images", "30", "--objects", "60"]) == 0
    assert "\n30 images, 65 classes, 60 objects" in capfd.readouterr().out


def test_options_are_the_fields_of_a_config() -> None:
    assert parsed(Bench, "A bench.", []) == Bench()
    words = ["--images", "7", "--folder", "a", "--picture", "3", "2", "--no-online"]
    assert parsed(Bench, "A bench.", words) == Bench(7, Path("a"), (3, 2), False)


def test_steps_of_training_are_measured(clip: str, tmp_path: Path) -> None:
    words = [
        "--clip",
        clip,
        "--images",
        "16",
        "--picture",
        "64",
        "48",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--settings",
        "train.batch_size=4",
        "input.short_side=48",
        "input.long_side=64",
        "train.workers=0",
    ]

    def script() -> int:
        sys.argv = ["bench_train.py", *words]
        runpy.run_path(str(FOLDER / "bench_train.py"), run_name="__main__")
        return 0

    code, printed = ranks(script, tmp_path / "printed.txt")
    assert code == 0, printed
    for name in ("detector alone", "three levels, from the cache", "three levels, CLIP in every step"):
        assert f"\n  {name}" in printed


def test_the_made_up_world_is_as_asked(tmp_path: Path) -> None:
    make_world(tmp_path, 5, base_boxes=2, proposals=3, size=(64, 48), pictures=2)
    tree, proposals = (json.loads((tmp_path / name).read_text()) for name in ("annotations.json", "proposals.json"))
    assert [image["file_name"] for image in tree["images"]] == ["0.jpg", "1.jpg", "0.jpg", "1.jpg", "0.jpg"]
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["0.jpg", "1.jpg"]
    assert [one["image_id"] for one in tree["annotations"]] == [k // 2 for k in range(10)]
    assert len({one["id"] for one in tree["annotations"]}) == 10
    assert [one["image_id"] for one in proposals] == [k // 3 for k in range(15)]
    assert all(min(x, y) >= 0 and x + w <= 64 and y + h <= 48 for x, y, w, h in (one["bbox"] for one in proposals))
