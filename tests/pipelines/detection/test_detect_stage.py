"""Detection in any pictures: the same as evaluation's, in forms that pycocotools reads, whatever lies among the
pictures.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from safetensors.numpy import save_file

from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.pipelines.detection.detect import DetectConfig, DetectionFolder, detect
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.runs import RunFolder


@pytest.fixture
def run_on(distilled: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DetectionFolder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))

    def run(*images: Path, out: Path = tmp_path / "out", **changes: Any) -> DetectionFolder:
        job = DetectConfig(
            run=distilled.path,
            images=tuple(map(str, images)),
            out=out,
            **({"threshold": 0.0, "device": "cpu"} | changes),
        )
        return detect(job, io.BytesIO())

    return run


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def _table(
    rows: list[dict[str, Any]], image: dict[int, str], category: dict[int, str]
) -> dict[tuple[str, str], np.ndarray]:
    """Boxes and scores by picture and name, each sorted by score."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        found.setdefault((image[row["image_id"]], category[row["category_id"]]), []).append(
            [row["score"], *row["bbox"]]
        )
    return {key: np.array(sorted(values, reverse=True)) for key, values in found.items()}


# --- the same as evaluation ---


def test_detections_are_those_of_evaluation(
    run_on: Callable[..., DetectionFolder], distilled: RunFolder, world: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    evaluate(
        EvalConfig(run=run, data=DataPaths(world), device="cpu", batch_size=1)
    )  # a picture is padded for its batch, and that shows
    truth = _json(world / "annotations" / "instances_val2017.json")
    expected = _table(
        _json(run / "detections.json"),
        {i["id"]: i["file_name"] for i in truth["images"]},
        {c["id"]: c["name"] for c in truth["categories"]},
    )
    run_on(world / "val2017")
    tree = _json(tmp_path / "out" / "images.json")
    found = _table(
        _json(tmp_path / "out" / "detections.json"),
        {i["id"]: Path(i["file_name"]).name for i in tree["images"]},
        {c["id"]: c["name"] for c in tree["categories"]},
    )
    assert len(expected) > 20
    assert found.keys() == expected.keys()
    for key, rows in expected.items():
        np.testing.assert_allclose(found[key], rows, atol=1e-4)


# --- the folder ---


def test_pycocotools_reads_what_was_written(
    run_on: Callable[..., DetectionFolder], world: Path, tmp_path: Path
) -> None:
    result = run_on(world / "val2017", pictures=False)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "out" / "images.json"))
        loaded = coco.loadRes(str(tmp_path / "out" / "detections.json"))
    assert len(loaded.anns) == result.objects.total() > 0
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(result.names)
    assert {c["supercategory"] for c in coco.cats.values()} == {"base", "novel"}
    assert not (tmp_path / "out" / "pictures").exists()
    assert not (tmp_path / "out" / "detections.jsonl").exists()


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """Three good pictures, of one name two, a broken one, and one of a single point."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    good = sorted((world / "val2017").iterdir())
    Image.open(good[0]).save(folder / "x.png")
    Image.open(good[1]).save(folder / "a" / "x.jpg")
    Image.open(good[2]).save(folder / "X-2.png")
    (folder / "broken.jpg").write_bytes(good[0].read_bytes()[:300])
    Image.new("RGB", (1, 1)).save(folder / "point.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_unreadable_are_skipped_and_nothing_is_overwritten(
    photos: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path, batch_size: int
) -> None:
    result = run_on(photos, batch_size=batch_size)
    tree = _json(tmp_path / "out" / "images.json")
    assert list(result.skipped) == [str(photos / "broken.jpg")]
    assert [one["file_name"] for one in tree["skipped"]] == [str(photos / "broken.jpg")]
    assert "broken.jpg" in tree["skipped"][0]["reason"]
    assert result.images == len(tree["images"]) == 4
    assert len({one["id"] for one in [*tree["images"], *tree["skipped"]]}) == 5
    drawn = {one["file_name"]: one["drawn"] for one in tree["images"]}
    assert len({name.lower() for name in drawn.values()}) == 4
    assert sorted(drawn.values()) == sorted(
        f"pictures/{file.name}" for file in (tmp_path / "out" / "pictures").iterdir()
    )
    for source, file in drawn.items():
        picture = Image.open(source)
        with Image.open(tmp_path / "out" / file) as shown:
            assert shown.width / shown.height == pytest.approx(picture.width / picture.height, rel=0.01)


def test_novel_names_are_orange_and_base_names_blue(
    distilled: RunFolder, world: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path
) -> None:
    protocol = distilled.protocol()
    picture = next((world / "val2017").iterdir())
    for name, novel in ((protocol.base[0], False), (protocol.novel[0], True)):
        out = tmp_path / name
        run_on(picture, out=out, classes=(name,))
        with Image.open(next((out / "pictures").iterdir())) as shown:
            pixels = np.asarray(shown).reshape(-1, 3).astype(int)
        near = {
            colour: int((np.abs(pixels - np.array(colour)).max(1) < 12).sum())
            for colour in ((60, 140, 255), (255, 130, 0))
        }
        assert near[255, 130, 0] * 10 < near[60, 140, 255] if not novel else near[60, 140, 255] * 10 < near[255, 130, 0]


def test_names_in_other_scripts_are_drawn(world: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path) -> None:
    result = run_on(next((world / "val2017").iterdir()), classes=("雨傘", "зонтик", "مظلة"))
    assert {c["name"] for c in _json(tmp_path / "out" / "images.json")["categories"]} == {"雨傘", "зонтик", "مظلة"}
    assert result.objects.total() > 0


def test_a_folder_of_something_else_is_left_alone(
    photos: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path, untouched: Callable[[Path], Any]
) -> None:
    with untouched(photos), pytest.raises(HdovdError, match="holds no detections"):
        run_on(photos, out=photos, overwrite=True)
    run_on(photos)
    with untouched(tmp_path / "out"), pytest.raises(HdovdError, match="--overwrite"):
        run_on(photos)
    run_on(photos / "point.png", overwrite=True)
    assert [file.name for file in (tmp_path / "out" / "pictures").iterdir()] == ["point.jpg"]


def test_what_was_found_before_a_kill_is_there(
    photos: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, pictures = DetectionFolder.count, list[object]()

    def killed(self: DetectionFolder, found: Any) -> Any:
        pictures.append(found)
        if len(pictures) == 3:
            raise KeyboardInterrupt
        return count(self, found)

    monkeypatch.setattr(DetectionFolder, "count", killed)
    with pytest.raises(KeyboardInterrupt):
        run_on(photos, batch_size=2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert sum("image" in line for line in lines) == 3
    assert not (tmp_path / "out" / "detections.json").exists()


# --- embeddings of a file ---


def test_a_file_of_embeddings_needs_no_clip(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    save_file({"rows": distilled.class_embeddings()[:2].numpy()}, tmp_path / "rows.safetensors")
    words = [
        "detect",
        str(distilled.path),
        str(next((world / "val2017").iterdir())),
        "--classes",
        "my thing, another",
        "--threshold",
        "0",
        "--class-embeddings",
        str(tmp_path / "rows.safetensors"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    child = os.fork()
    if not child:  # as a fresh process, but for torch: every module of ours is imported again, and open_clip cannot be
        try:
            for name in [name for name in sys.modules if name.split(".")[0] in ("hdovd", "open_clip")]:
                del sys.modules[name]
            sys.modules["open_clip"], sys.argv = None, ["hdovd", *words]  # type: ignore[assignment]
            importlib.import_module("hdovd.cli.main").main()
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {c["name"] for c in _json(tmp_path / "out" / "images.json")["categories"]} == {"my thing", "another"}
    assert _json(tmp_path / "out" / "detections.json")


def test_rows_that_do_not_go_with_the_names_are_refused(
    photos: Path, run_on: Callable[..., DetectionFolder], tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", np.ones((3, 24), np.float32))
    with pytest.raises(HdovdError, match=r"\(3, 24\), expected \(2, D\): a row for each name, a first and b last"):
        run_on(photos, classes=("a", "b"), class_embeddings=tmp_path / "rows.npy")
    assert not (tmp_path / "out").exists()


# --- the command ---


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--classes", "a, B,, b"], 0, "named twice, taken once: b"),
        (["--classes", "@names.txt"], 0, "hot dog, cat"),
        (["--classes", ","], 1, "names nothing"),
        (["--classes", "names.txt"], 1, "@names.txt"),
        (["--threshold", "1"], 1, "--threshold"),
    ],
)
def test_the_command(
    photos: Path,
    distilled: RunFolder,
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hdovd.cli.main import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("hot dog\n\ncat\n")
    monkeypatch.setattr(sys, "argv", ["hdovd", "detect", str(distilled.path), "photos", "--out", "out", *words])
    ended = 0
    try:
        main()
    except SystemExit as end:
        ended = int(end.code or 0)
    printed = capsys.readouterr()
    assert ended == code
    assert said in printed.out + printed.err


def test_nothing_readable_ends_with_exit_code_1(
    photos: Path,
    distilled: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hdovd.cli.main import main

    monkeypatch.setattr(
        sys,
        "argv",
        ["hdovd", "detect", str(distilled.path), str(photos / "broken.jpg"), "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "1 file skipped" in capsys.readouterr().out
    assert _json(tmp_path / "out" / "detections.json") == []
