"""`hdovd export-labels`: boxes, names and scores of every source are in every form, and our own readers find them there
again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.cli.main import app
from hdovd.core import HdovdError, counted, lines_to
from hdovd.data import DataPaths, read_instances
from hdovd.pipelines.detection.config import DetectConfig
from hdovd.pipelines.detection.detect import detect
from hdovd.pipelines.label_export.config import ExportLabelsConfig, LabelForm
from hdovd.pipelines.label_export.export import export_labels
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.search.config import SearchConfig
from hdovd.pipelines.search.search import search

PICTURES = {1: ("a b.jpg", 64, 48), 2: ("deep/b&c.jpg", 50, 40), 3: ("d.jpg", 32, 32)}
NAMES = {3: "cat", 7: 'tüll & "lace"', 9: "dog"}
FOUND = [
    {"image_id": 1, "category_id": 3, "bbox": [1.25, 2.5, 30.1, 20.7], "score": 0.875},
    {"image_id": 1, "category_id": 7, "bbox": [0, 0, 64, 48], "score": 0.5},
    {"image_id": 2, "category_id": 7, "bbox": [10, 10.3, 3.7, 29.7], "score": 0.25},
]
Rows = dict[str, list[tuple[str, float, float, float, float]]]  # by picture: name, x, y, width, height


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A COCO data set of three pictures, and found/detections.json on two of them."""
    root = tmp_path / "data"
    for name, width, height in PICTURES.values():
        picture(root / "val2017" / name, width, height)
    images = [{"id": i, "file_name": f, "width": w, "height": h} for i, (f, w, h) in PICTURES.items()]
    categories = [{"id": number, "name": name} for number, name in NAMES.items()]
    tree = {"images": images, "annotations": [], "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(tree))
    (tmp_path / "detections.json").write_text(json.dumps(FOUND))
    return root


def picture(file: Path, width: int, height: int) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(file)


def exported(source: Path, out: Path, form: str, **options: Any) -> tuple[Path, list[str]]:
    lines = list[str]()
    with lines_to(lines.append):
        export_labels(ExportLabelsConfig(cache=source, to=LabelForm(form), out=out, **options))
    return out, lines


def rows_of(file: Path) -> Rows:
    found = read_instances(file)
    rows: Rows = {}
    for image_id, category, box in zip(
        found.image_ids.tolist(), found.categories.tolist(), found.boxes.tolist(), strict=True
    ):
        rows.setdefault(found.images[image_id][0], []).append((found.names[category], *box))
    return {name: sorted(own) for name, own in rows.items()}


def read_back(out: Path, form: str, pictures: Path) -> Rows:
    """What our own readers find in what was written; of labelling tools, after somebody has confirmed all."""
    if form == "coco":
        return rows_of(out / "instances.json")
    if form == "label-studio":  # as it exports predictions that were accepted
        tasks = json.loads((out / "tasks.json").read_text())
        for task in tasks:
            task["annotations"] = task.pop("predictions")
        (out / "project-1-at-2026.json").write_text(json.dumps(tasks))
    if form != "yolo":
        shutil.copytree(pictures, out / "images")
    found = rows_of(DataPaths(out, form=form).annotation_file("train2017"))
    return {name.removeprefix("images/"): own for name, own in found.items()}


def alike(found: Rows, wanted: Rows) -> bool:
    """To a hundredth of a pixel."""
    return found.keys() == wanted.keys() and all(
        [name for name, *_ in found[key]] == [name for name, *_ in own]
        and np.allclose([box for _, *box in found[key]], [box for _, *box in own], atol=0.01, rtol=0)
        for key, own in wanted.items()
    )


@pytest.mark.parametrize("form", [form for form in LabelForm if form != "fiftyone"])
def test_what_goes_out_comes_in_again(data: Path, tmp_path: Path, form: str) -> None:
    out, lines = exported(tmp_path / "detections.json", tmp_path / "out", form, data=DataPaths(data))
    wanted: Rows = {}
    for one in FOUND:
        wanted.setdefault(PICTURES[one["image_id"]][0], []).append((NAMES[one["category_id"]], *one["bbox"]))
    assert alike(read_back(out, form, data / "val2017"), {name: sorted(own) for name, own in wanted.items()})
    assert lines[-1] == f"wrote {out}: 3 boxes on 2 pictures"


def test_fiftyone(data: Path, tmp_path: Path) -> None:
    """Of FiftyOne's importer: paths of pictures, or names in data/, which has to be there; boxes in parts of sides."""
    out, _ = exported(tmp_path / "detections.json", tmp_path / "out", "fiftyone", data=DataPaths(data))
    tree = json.loads((out / "labels.json").read_text())
    assert tree["classes"] == list(NAMES.values())
    assert (out / "data").is_dir()
    assert [*tree["labels"]] == [str(data / "val2017" / PICTURES[number][0]) for number in (1, 2)]
    first = tree["labels"][str(data / "val2017" / "a b.jpg")][0]
    assert (first["label"], first["confidence"]) == ("cat", 0.875)
    assert np.allclose(np.array(first["bounding_box"]) * [64, 48, 64, 48], FOUND[0]["bbox"], atol=0.01)


def test_fiftyones_own_importer_reads_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIFTYONE_DATABASE_URI", "mongodb://127.0.0.1:9")  # none is asked
    importers = pytest.importorskip("fiftyone.utils.data.importers")
    out, _ = exported(tmp_path / "detections.json", tmp_path / "out", "fiftyone", data=DataPaths(data))
    with importers.FiftyOneImageDetectionDatasetImporter(dataset_dir=str(out)) as importer:
        found = {path: label.detections for path, _, label in importer}
    assert [len(own) for own in found.values()] == [2, 1]
    assert all(map(os.path.isfile, found))
    assert [one.confidence for own in found.values() for one in own] == [one["score"] for one in FOUND]


def test_scores_are_in_all_forms(data: Path, tmp_path: Path) -> None:
    wanted = [one["score"] for one in FOUND]
    outs = {
        form: exported(tmp_path / "detections.json", tmp_path / form, form, data=DataPaths(data))[0]
        for form in LabelForm
    }
    tasks = json.loads((outs["label-studio"] / "tasks.json").read_text())
    coco = json.loads((outs["coco"] / "instances.json").read_text())
    lines = sorted((outs["yolo"] / "predictions").rglob("*.txt"))
    assert [one["score"] for task in tasks for one in task["predictions"][0]["result"]] == wanted
    assert [task["predictions"][0]["score"] for task in tasks] == [0.875, 0.25]
    assert [one["score"] for one in coco["annotations"]] == wanted
    assert [one["category_id"] for one in coco["annotations"]] == [one["category_id"] for one in FOUND]
    assert [float(line.split()[5]) for file in lines for line in file.read_text().splitlines()] == wanted
    scores = ElementTree.parse(outs["cvat"] / "annotations.xml").findall("image/box/attribute[@name='score']")
    assert [float(one.text or "") for one in scores] == wanted


def test_what_labelling_tools_are_told_of_names(data: Path, tmp_path: Path) -> None:
    config = ElementTree.parse(
        exported(
            tmp_path / "detections.json", tmp_path / "ls", "label-studio", data=DataPaths(data), image_prefix="s3://b/"
        )[0]
        / "labels.xml"
    )
    assert [one.get("value") for one in config.findall("RectangleLabels/Label")] == list(NAMES.values())
    tasks = json.loads((tmp_path / "ls" / "tasks.json").read_text())
    assert [task["data"]["image"] for task in tasks] == ["s3://b/a%20b.jpg", "s3://b/deep/b%26c.jpg"]
    out, _ = exported(tmp_path / "detections.json", tmp_path / "cvat", "cvat", data=DataPaths(data))
    labels = json.loads((out / "labels.json").read_text())
    assert [one["name"] for one in labels] == list(NAMES.values())
    assert [one["name"] for one in labels[0]["attributes"]] == ["score", "other"]


def test_yolo_is_a_data_set_of_training_pictures(data: Path, tmp_path: Path) -> None:
    out, _ = exported(tmp_path / "detections.json", tmp_path / "out", "yolo", data=DataPaths(data))
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "train": "images",
        "val": None,
        "names": list(NAMES.values()),
    }
    assert (out / "images" / "deep" / "b&c.jpg").resolve() == (data / "val2017" / "deep" / "b&c.jpg").resolve()
    assert not DataPaths(out).has("val2017")
    picture(data / "val2017" / "a b.png", 9, 9)
    tree = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    tree["images"].append({"id": 4, "file_name": "a b.png", "width": 9, "height": 9})
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(tree))
    (tmp_path / "detections.json").write_text(json.dumps([*FOUND, FOUND[0] | {"image_id": 4}]))
    with pytest.raises(HdovdError, match=r"a b\.jpg and a b\.png have one file of labels in YOLO's form"):
        exported(tmp_path / "detections.json", tmp_path / "again", "yolo", data=DataPaths(data))


# --- sources ---


def test_pseudo_boxes_of_a_cache(cache: Path, tmp_path: Path) -> None:
    out, _ = exported(cache, tmp_path / "out", "coco")
    opened, tree = FeatureCache(cache), json.loads((out / "instances.json").read_text())
    nouns, wanted = opened.names(Level.NOUN), []
    for image in tree["images"]:
        rows = opened.instances(image["id"])
        for k in np.flatnonzero(rows.noun >= 0):
            left, top, right, lower = rows.box[k].astype(float)
            wanted.append((nouns[rows.noun[k]], float(rows.noun_cosine[k]), left, top, right - left, lower - top))
    names = {one["id"]: one["name"] for one in tree["categories"]}
    assert wanted == [(names[one["category_id"]], one["score"], *one["bbox"]) for one in tree["annotations"]]
    assert len(wanted) == int((opened.rows_between(0, len(opened.row_images())).noun >= 0).sum()) > 10
    assert names == dict(enumerate(sorted({name for name, *_ in wanted}), start=1))


@pytest.mark.parametrize("form", ["--json", "--coco"])
def test_suspicious_boxes_have_both_names(cache: Path, world: Path, tmp_path: Path, form: str) -> None:
    words = ["search", str(cache), "--suspicious", "-k", "4"]
    file = tmp_path / "suspicious.json"
    if form == "--json":
        file.write_text(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    else:
        CliRunner().invoke(app, [*words, "--coco", str(file)], catch_exceptions=False)
    hits = search(SearchConfig(cache=cache, suspicious=True, count=4))
    out, _ = exported(file, tmp_path / "out", "coco", data=DataPaths(world))
    tree = json.loads((out / "instances.json").read_text())
    names = {one["id"]: one["name"] for one in tree["categories"]}
    found = {(one["image_id"], names[one["category_id"]], one["other"], one["score"]) for one in tree["annotations"]}
    assert found == {(hit.image_id, hit.name, hit.other, hit.cosine) for hit in hits}
    assert {image["file_name"] for image in tree["images"]} == {f"{hit.image_id:012d}.jpg" for hit in hits}
    out, _ = exported(file, tmp_path / "ls", "label-studio", data=DataPaths(world))
    results = [one["predictions"][0]["result"][0] for one in json.loads((out / "tasks.json").read_text())]
    assert {one["meta"]["text"][0] for one in results} <= {hit.other for hit in hits}


def test_pictures_of_detect_are_known(
    distilled: RunFolder, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By images.json beside the detections, all of them, from the folder that hdovd detect was run in."""
    monkeypatch.chdir(world)
    config = DetectConfig(
        run=distilled.path, images=("val2017",), out=tmp_path / "found", threshold=0.0, pictures=False
    )
    detect(config)
    out, _ = exported(tmp_path / "found" / "detections.json", tmp_path / "out", "coco", min_score=1.1)
    assert len(json.loads((out / "instances.json").read_text())["images"]) == len([*(world / "val2017").iterdir()])
    _, lines = exported(tmp_path / "found" / "detections.json", tmp_path / "fiftyone", "fiftyone")
    assert not any("not there" in line for line in lines)
    monkeypatch.chdir(tmp_path)
    _, lines = exported(tmp_path / "found" / "detections.json", tmp_path / "elsewhere", "fiftyone")
    assert any(line.startswith("note: 8 pictures are not there: ") for line in lines)
    _, lines = exported(
        tmp_path / "found" / "detections.json", tmp_path / "named", "fiftyone", data=DataPaths(images=world)
    )
    assert not any("not there" in line for line in lines)


def test_pictures_of_detect_elsewhere(
    distilled: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the folder that hdovd detect was run in, beside it and by absolute paths, all at once."""
    here = tmp_path / "a" / "here"
    picture(here / "inside.png", 9, 9)
    picture(tmp_path / "a" / "x.png", 9, 9)
    monkeypatch.chdir(here)
    words = ("inside.png", "../x.png", "../../data/val2017/d.jpg", str(data / "val2017" / "a b.jpg"))
    detect(DetectConfig(run=distilled.path, images=words, out=tmp_path / "found", threshold=0.0, pictures=False))
    wanted = ["a/here/inside.png", "a/x.png", "data/val2017/d.jpg", "data/val2017/a b.jpg"]
    for number, images in enumerate((None, here, here)):
        given = {} if images is None else {"data": DataPaths(images=images)}
        out, lines = exported(tmp_path / "found" / "detections.json", tmp_path / f"out{number}", "coco", **given)
        assert [one["file_name"] for one in json.loads((out / "instances.json").read_text())["images"]] == wanted
        assert not any("not there" in line for line in lines)
        monkeypatch.chdir(tmp_path)
    out, _ = exported(tmp_path / "found" / "detections.json", tmp_path / "y", "yolo", data=DataPaths(images=here))
    assert all((out / "images" / name).samefile(tmp_path / name) for name in wanted)


@pytest.mark.parametrize("form", LabelForm)
def test_names_of_files_that_are_no_text(
    distilled: RunFolder, data: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux allows them. What can hold them holds them; elsewhere they alone are left out."""
    names = [os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"f\xe9/d.jpg"), "gr\u00fcn \ufffd.jpg"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        picture(tmp_path / "p" / name, 32, 32)
    detect(DetectConfig(run=distilled.path, images=("p",), out=tmp_path / "found", threshold=0.0, pictures=False))
    out, lines = exported(tmp_path / "found" / "detections.json", tmp_path / "out", form)
    left = [line for line in lines if line.startswith("left out: ")]
    if form == "yolo":
        assert not left
        assert all((out / "images" / "p" / name).samefile(tmp_path / "p" / name) for name in names)
        assert all(len((out / "labels" / "p" / name).with_suffix(".txt").read_text()) > 9 for name in names)
        return
    assert len(left) == 1
    assert f"2 pictures whose names are no UTF-8, which the texts of {form} cannot hold, but --to yolo" in left[0]
    assert "p/caf\ufffd.jpg" in left[0]
    texts = "".join(file.read_text("utf-8") for file in out.iterdir() if file.is_file())
    assert "caf" not in texts
    assert "gr\u00fcn" in texts or "gr\\u00fcn" in texts or "gr%C3%BCn" in texts
    assert lines[-1].endswith(" on 1 picture")


@pytest.mark.parametrize(("form", "known"), [("yolo", 2), ("coco", 1)])
def test_annotations_that_name_files_that_are_no_text(data: Path, tmp_path: Path, form: str, known: int) -> None:
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("deep/b&c.jpg", "caf\\udce9.jpg"))
    _, lines = exported(tmp_path / "detections.json", tmp_path / "out", form, data=DataPaths(data))
    assert lines[-1].endswith(f" on {counted(known, 'picture')}")
    file.write_text(file.read_text().replace("caf\\udce9.jpg", "caf\\ud800.jpg"))
    with pytest.raises(HdovdError, match=r"image 2: file_name is .*ud800.* cannot be printed"):
        exported(tmp_path / "detections.json", tmp_path / "again", form, data=DataPaths(data))


def test_the_command(data: Path, tmp_path: Path, untouched: Callable[[Path], Any]) -> None:
    words = ["export-labels", str(tmp_path / "detections.json"), "--data", str(data), "--to", "cvat"]
    with untouched(data):
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--min-score", "0.5"])
    assert done.exit_code == 0, done.output
    assert "left out: 1 box: score below 0.5" in done.output
    assert f"wrote {tmp_path / 'out'}: 2 boxes on 1 picture" in done.output


# --- bad input ---


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 99}, r"entry 1 is not of a picture and category that are known.*KeyError\(99\).*by --data"),
        ({"category_id": 1}, r"entry 1 is not of a picture and category that are known.*KeyError\(1\)"),
        ({"score": None}, r"entry 1 .*lacks .*score \(TypeError"),
        ({"name": 3}, r"entry 1 is 3, expected a name"),
        ({"name": "a\x1bb"}, r"entry 1 is the text .* cannot be printed"),
    ],
    ids=["image", "category", "score", "name", "control"],
)
def test_entries_that_cannot_be_taken(data: Path, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    (tmp_path / "detections.json").write_text(json.dumps([FOUND[0], FOUND[1] | entry]))
    with pytest.raises(HdovdError, match=message):
        exported(tmp_path / "detections.json", tmp_path / "out", "cvat", data=DataPaths(data))
    assert not (tmp_path / "out").exists()


def test_boxes_that_are_none_are_left_out_and_told(data: Path, tmp_path: Path) -> None:
    odd = [
        {"bbox": [1, 2, -3, 4]},
        {"bbox": [1, 2, 3]},
        {"bbox": [100, 2, 3, 4]},
        {"score": float("nan")},
        {"name": ""},
    ]
    (tmp_path / "detections.json").write_text(json.dumps([*FOUND, *(FOUND[0] | one for one in odd)]))
    _, lines = exported(tmp_path / "detections.json", tmp_path / "out", "cvat", data=DataPaths(data))
    assert [line for line in lines if "left out" in line] == [
        "left out: 1 box: box is inverted (negative width or height)",
        "left out: 1 box: box is not four numbers",
        "left out: 1 box: box lies outside the image",
        "left out: 1 box: score is no number",
        "left out: 1 box: without a name",
    ]


def test_files_and_folders_that_are_others(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "detections.json"
    with pytest.raises(HdovdError, match="give --data ROOT, or both --images and --annotations"):
        exported(file, tmp_path / "out", "cvat")
    with pytest.raises(HdovdError, match=r"instances_val2017\.json: entry 0 is not of a picture and category"):
        exported(data / "annotations" / "instances_val2017.json", tmp_path / "out", "cvat", data=DataPaths(data))
    for name, told in {"gone": "no feature cache at .*gone", "gone.json": r"no file .*gone\.json: name"}.items():
        with pytest.raises(HdovdError, match=told):
            exported(tmp_path / name, tmp_path / "out", "cvat")
    with pytest.raises(HdovdError, match=r"data is there already: give a folder that is new or empty"):
        exported(file, data, "cvat", data=DataPaths(data))
    file.write_text("[1, 2]")
    with pytest.raises(HdovdError, match=r"entry 0 is not of a picture"):
        exported(file, tmp_path / "out", "cvat", data=DataPaths(data))
