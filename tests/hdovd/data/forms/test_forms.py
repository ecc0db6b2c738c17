"""Forms of data sets: the same drawn world in each gives the same boxes, and what cannot be read is a line that says
what and where.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.core import HdovdError, lines_to, user_cache_folder
from hdovd.data import DataPaths, Protocol, Split
from hdovd.data.forms.converted import LABEL_STUDIO
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.options import data_of, validation_of

PROTOCOL = Protocol("mine", ("cat", "zebra"), ("dog",), min_image_side_px=1)
NAMES = ["cat", "dog", "zebra"]
SPLITS = ("train", "val")
# A picture: width, height, and boxes (class, x, y, x2, y2), whole pixels from the upper left corner, the last left out.
World = dict[str, dict[str, tuple[int, int, list[tuple[str, int, int, int, int]]]]]
WORLD: World = {
    "train": {
        "a1": (64, 48, [("cat", 0, 0, 20, 10), ("zebra", 30, 5, 64, 48)]),
        "b2": (40, 50, [("dog", 4, 8, 12, 24), ("cat", 1, 2, 3, 5)]),
        "c.3": (32, 32, [("zebra", 0, 16, 32, 32)]),
    },
    "val": {
        "d4": (50, 40, [("dog", 10, 10, 30, 20), ("zebra", 5, 5, 50, 40)]),
        "e5": (36, 36, [("cat", 0, 0, 36, 36)]),
    },
}


def picture(file: Path, width: int, height: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(file, "JPEG")


def instances(split: str, file_name: Callable[[str], str], **of_images: Any) -> dict[str, Any]:
    images, annotations = [], []
    for number, (name, (width, height, boxes)) in enumerate(WORLD[split].items(), start=1):
        images.append({"id": number, "file_name": file_name(name), "width": width, "height": height, **of_images})
        for kind, x, y, right, lower in boxes:
            box = [x, y, right - x, lower - y]
            place = {"id": len(annotations) + 1, "image_id": number, "category_id": NAMES.index(kind)}
            annotations.append({**place, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(file: Path, tree: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree))


def write_coco(root: Path) -> None:
    for split in SPLITS:
        write_json(root / "annotations" / f"instances_{split}2017.json", instances(split, lambda name: f"{name}.jpg"))
        for name, (width, height, _) in WORLD[split].items():
            picture(root / f"{split}2017" / f"{name}.jpg", width, height)


def write_lvis(root: Path, folder: str = "annotations") -> None:
    """Pictures of the validation lie in both folders."""
    for split in SPLITS:
        tree = instances(split, str, neg_category_ids=[], not_exhaustive_category_ids=[])
        for image in tree["images"]:
            name = image.pop("file_name")
            place = "train2017" if split == "train" or name == "e5" else "val2017"
            image["coco_url"] = f"http://images.cocodataset.org/{place}/{name}.jpg"
            picture(root / place / f"{name}.jpg", image["width"], image["height"])
        write_json(root / folder / f"lvis_v1_{split}.json", tree)


def write_objects365(root: Path, folders: str = "train/patch{}") -> None:
    for split in SPLITS:
        tree = instances(split, lambda name: f"images/v1/patch{ord(name[0]) % 2}/{name}.jpg")
        write_json(root / f"zhiyuan_objv2_{split}.json", tree)
        for name, (width, height, _) in WORLD[split].items():
            patch = folders.format(ord(name[0]) % 2).replace("train", split)
            picture(root / patch / f"{name}.jpg", width, height)


def xml(width: int, height: int, boxes: Sequence[Any], first: int = 1, difficult: Sequence[int] = ()) -> str:
    objects = "".join(
        f"<object><name>{kind}</name><difficult>{int(place in difficult)}</difficult><bndbox><xmax>{x2}</xmax><xmin>"
        f"{x + first}</xmin><ymin>{y + first}</ymin><ymax>{y2}</ymax></bndbox><part><name>head</name></part></object>\n"
        for place, (kind, x, y, x2, y2) in enumerate(boxes)
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>\n<filename>x.jpg</filename>{size}\n{objects}</annotation>\n"


def write_voc(root: Path, first: int = 1, lists: tuple[str, str] = ("train", "val")) -> None:
    for split, name_of_list in zip(SPLITS, lists, strict=True):
        for name, (width, height, boxes) in WORLD[split].items():
            picture(root / "JPEGImages" / f"{name}.jpg", width, height)
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(xml(width, height, boxes, first))
        write_list(root, name_of_list, WORLD[split])


def write_list(root: Path, name: str, pictures: Sequence[str] | World) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{one}\n" for one in pictures))


def write_yolo(root: Path, settings: str = "path: .\ntrain: images/train\nval: images/val\n") -> None:
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(f"{settings}names: {{0: cat, 1: dog, 2: zebra}}\n")
    for split in SPLITS:
        for name, (width, height, boxes) in WORLD[split].items():
            picture(root / "images" / split / f"{name}.jpg", width, height)
            lines = []
            for kind, x, y, x2, y2 in boxes:
                sides = ((x + x2) / 2 / width, (y + y2) / 2 / height, (x2 - x) / width, (y2 - y) / height)
                lines.append(" ".join(map(str, (NAMES.index(kind), *sides))))
            label = root / "labels" / split / f"{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines) + "\n")


def region(width: int, height: int, kind: str, box: Sequence[float], **more: Any) -> dict[str, Any]:
    """A rectangle as Label Studio has it: of upper left corner, width and height, in percent."""
    x, y, x2, y2 = box
    sides = {"x": 100 * x / width, "y": 100 * y / height}
    sides |= {"width": 100 * (x2 - x) / width, "height": 100 * (y2 - y) / height}
    value = {**sides, "rotation": 0, "rectanglelabels": [kind], **more}
    return {"original_width": width, "original_height": height, "image_rotation": 0, "value": value}


def task(address: str, regions: Sequence[dict[str, Any]], **annotation: Any) -> dict[str, Any]:
    about = {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "origin": "manual"}
    result = [{"id": f"r{number}", **about, **one} for number, one in enumerate(regions)]
    done = {"id": 7, "completed_by": 1, "was_cancelled": False, "ground_truth": False, "result": result, **annotation}
    return {"id": 1, "annotations": [done], "predictions": [], "data": {"image": address}, "file_upload": "x.jpg"}


def write_label_studio(root: Path, minimal: bool = False) -> None:
    """Training pictures uploaded, validation pictures served from a folder."""
    for split in SPLITS:
        tasks = list[Any]()
        for name, (width, height, boxes) in WORLD[split].items():
            picture(root / split / "images" / f"{name}.jpg", width, height)
            uploaded, served = f"/data/upload/3/0a1b2c3d-{name}.jpg", f"/data/local-files/?d=my%20set/{name}.jpg"
            regions = [region(width, height, kind, box) for kind, *box in boxes]
            tasks.append(task(uploaded if split == "train" else served, regions))
            if minimal:
                flat = [{**one.pop("value"), **one} for one in regions]
                tasks[-1] = {
                    "image": uploaded if split == "train" else served,
                    "id": 1,
                    "label": flat,
                    "annotator": 1,
                    "created_at": "2026-01-01",
                }
        write_json(root / split / "project-3-at-2026-01-01-00-00-0a1b2c3d.json", tasks)


def cvat(pictures: Sequence[tuple[str, int, int, str]], more: str = "") -> str:
    labels = "".join(f"<label><name>{name}</name><attributes/></label>" for name in NAMES)
    images = "".join(
        f'<image id="{number}" name="{name}" {more} width="{width}" height="{height}">{shapes}</image>\n'
        for number, (name, width, height, shapes) in enumerate(pictures)
    )
    return (
        f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>{images}</annotations>"
    )


def shape(kind: str, box: Sequence[float], more: str = "") -> str:
    sides = " ".join(f'{key}="{side}"' for key, side in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True))
    about = f'label="{kind}" source="manual" occluded="0" {sides} z_order="0"{more}'
    return f'<box {about}><attribute name="a">1</attribute></box>'


def write_cvat(root: Path) -> None:
    for split in SPLITS:
        pictures = list[Any]()
        for name, (width, height, boxes) in WORLD[split].items():
            picture(root / split / "images" / f"{name}.jpg", width, height)
            pictures.append((f"{name}.jpg", width, height, "".join(shape(kind, box) for kind, *box in boxes)))
        (root / split / "annotations.xml").write_text(cvat(pictures))


WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": write_coco,
    "lvis": write_lvis,
    "lvis in the root": lambda root: write_lvis(root, ""),
    "objects365": write_objects365,
    "objects365 as named": lambda root: write_objects365(root, "images/v1/patch{}"),
    "voc": write_voc,
    "voc with test": lambda root: write_voc(root, lists=("trainval", "test")),
    "voc in its year": lambda root: write_voc(root / "VOC2007"),
    "voc in the devkit": lambda root: write_voc(root / "VOCdevkit" / "VOC2012"),
    "yolo": write_yolo,
    "label-studio": write_label_studio,
    "label-studio JSON-MIN": lambda root: write_label_studio(root, minimal=True),
    "cvat": write_cvat,
}


def load(root: Path, split: str = "train", *, all_boxes: bool = True, **paths: Any) -> Split:
    protocol = PROTOCOL.all_base() if all_boxes else PROTOCOL
    return DataPaths(root, **paths).load(f"{split}2017", protocol, base_only=split == "train")


def boxes_of(split: Split) -> dict[str, Any]:
    """By picture: size, and its boxes with the names of their classes."""
    names = PROTOCOL.names
    return {
        Path(image.file_name).stem: (
            image.width,
            image.height,
            sorted((names[label], *map(float, box)) for label, box in zip(image.labels, image.boxes, strict=True)),
        )
        for image in split.images
    }


def expected(split: str) -> dict[str, Any]:
    return {
        name: (width, height, sorted((kind, *map(float, box)) for kind, *box in boxes))
        for name, (width, height, boxes) in WORLD[split].items()
    }


def number_of(found: Split, name: str) -> int:
    """The id of a picture in the file that a split was read from."""
    images = json.loads(found.annotations.read_text())["images"]
    (number,) = [image["id"] for image in images if Path(image["file_name"]).stem == name]
    return int(number)


def alike(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Boxes to a thousandth of a pixel: YOLO's and Label Studio's are of parts of a side."""
    return found.keys() == wanted.keys() and all(
        found[name][:2] == wanted[name][:2]
        and [kind for kind, *_ in found[name][2]] == [kind for kind, *_ in wanted[name][2]]
        and np.allclose([box for _, *box in found[name][2]], [box for _, *box in wanted[name][2]], atol=1e-3)
        for name in wanted
    )


@pytest.mark.parametrize("form", WRITERS)
def test_the_same_world_in_each_form(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path)
    for split in SPLITS:
        found = load(tmp_path, split)
        assert alike(boxes_of(found), expected(split))
        if "yolo" not in form and "label" not in form:
            assert boxes_of(found) == expected(split)
        assert [read_pixels(found, image).shape[1:] for image in found.images] == [
            (image.height, image.width) for image in found.images
        ]
        named = load(tmp_path, split, form=form.split()[0])
        assert boxes_of(named) == boxes_of(found)


@pytest.mark.parametrize("form", WRITERS)
def test_novel_boxes_stay_out_of_training(tmp_path: Path, form: str) -> None:
    WRITERS[form](tmp_path)
    found = boxes_of(load(tmp_path, all_boxes=False))
    assert {kind for _, _, boxes in found.values() for kind, *_ in boxes} == {"cat", "zebra"}


@pytest.mark.parametrize("form", WRITERS)
def test_validation_is_found(tmp_path: Path, form: str) -> None:
    given = {"data": tmp_path, "val_images": None, "val_annotations": None, "form": "auto"}
    assert validation_of(given) is None
    WRITERS[form](tmp_path)
    assert validation_of(given) == DataPaths(tmp_path)
    for file in tmp_path.rglob("*"):
        if (
            file.match("val/project-*")
            or file.match("val/annotations.xml")
            or file.name in ("val.txt", "test.txt")
            or file.name.endswith(("_val.json", "_val2017.json"))
        ):
            file.unlink()
        elif file.name == "data.yaml":
            file.write_text("train: images/train\nnames: [cat, dog, zebra]\n")
    assert validation_of(given) is None
    with pytest.raises(HdovdError, match=r"annotations: no file .*val"):
        DataPaths(tmp_path).locate("val2017")
    assert load(tmp_path).images


def test_the_options_name_a_form(tmp_path: Path) -> None:
    given = {"data": tmp_path, "images": None, "annotations": None, "val_images": None, "val_annotations": tmp_path}
    assert data_of(given | {"form": "voc"}) == DataPaths(tmp_path, form="voc")
    assert validation_of(given | {"form": "voc"}) == DataPaths(tmp_path, None, tmp_path, "voc")


# --- which form it is ---


def test_a_folder_of_no_form(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"is of no known form.*coco: annot.*lvis: .*objects365: .*voc: .*yolo: data"):
        load(tmp_path)
    with pytest.raises(HdovdError, match=r"--form 'yolov8', did you mean yolo: expected coco, lvis, .*my_module:name"):
        load(tmp_path, form="yolov8")
    with pytest.raises(
        HdovdError, match=r"--form pathlib:Path: expected a Form of hdovd.data.forms.base, found <class"
    ):
        load(tmp_path, form="pathlib:Path")


def test_a_folder_of_two_forms(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_yolo(tmp_path)
    with pytest.raises(HdovdError, match="is of several forms: say which with --form voc or yolo"):
        load(tmp_path)
    assert load(tmp_path, form="yolo").annotations != load(tmp_path, form="voc").annotations


def test_coco_is_coco_whatever_lies_beside(tmp_path: Path) -> None:
    """As before there were other forms: LVIS's files lie beside COCO's in many folders."""
    write_coco(tmp_path)
    write_lvis(tmp_path)
    assert load(tmp_path).annotations.name == "instances_train2017.json"
    assert load(tmp_path, form="lvis").annotations.name == "lvis_v1_train.json"


def test_annotations_that_are_given_are_coco(tmp_path: Path) -> None:
    """--annotations with --data mean what they meant: a COCO file, of pictures in ROOT/train2017."""
    write_coco(tmp_path)
    moved = (tmp_path / "annotations").rename(tmp_path / "elsewhere") / "instances_train2017.json"
    assert boxes_of(load(tmp_path, annotations=moved)) == expected("train")
    write_yolo(tmp_path)
    found = load(tmp_path, annotations=moved)
    assert (found.folder, found.annotations) == (tmp_path / "train2017", moved)
    with pytest.raises(HdovdError, match="no image folder nowhere"):
        load(tmp_path, images=Path("nowhere"))


# --- LVIS ---


def test_lvis_packed(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    for file in (tmp_path / "annotations").iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert boxes_of(load(tmp_path, "val")) == expected("val")


@pytest.mark.parametrize(("gone", "split"), [("train2017", "train"), ("train2017", "val"), ("val2017", "val")])
def test_lvis_without_a_folder(tmp_path: Path, gone: str, split: str) -> None:
    write_lvis(tmp_path)
    shutil.rmtree(tmp_path / gone)
    with pytest.raises(HdovdError, match=rf"no image folder .*/{gone}: "):
        load(tmp_path, split)


def test_training_on_lvis_needs_one_folder_alone(tmp_path: Path) -> None:
    write_lvis(tmp_path)
    shutil.rmtree(tmp_path / "val2017")
    assert boxes_of(load(tmp_path)) == expected("train")


def test_lvis_under_cocos_name_and_the_other_way_round(tmp_path: Path) -> None:
    write_lvis(tmp_path / "lvis")
    write_coco(tmp_path / "coco")
    lvis, coco = (tmp_path / form / "annotations" for form in ("lvis", "coco"))
    shutil.copy(lvis / "lvis_v1_train.json", coco / "instances_train2017.json")
    with pytest.raises(HdovdError, match=r"instances_train2017\.json is LVIS's .*read as not LVIS's.*--form"):
        load(tmp_path / "coco")
    shutil.copy(coco / "instances_val2017.json", lvis / "lvis_v1_val.json")
    with pytest.raises(
        HdovdError, match=r"lvis_v1_val\.json is not LVIS's .*no neg_category_ids.*read as LVIS's.*--form"
    ):
        load(tmp_path / "lvis", "val")
    given = {"images": tmp_path / "coco" / "val2017", "annotations": coco / "instances_val2017.json"}
    with pytest.raises(HdovdError, match=r"is not LVIS's"):
        load(tmp_path / "lvis", "val", form="lvis", **given)
    assert load(tmp_path / "lvis", "val", **given).images
    given = {"images": tmp_path / "lvis", "annotations": lvis / "lvis_v1_train.json"}
    assert boxes_of(load(tmp_path / "coco", **given)) == expected("train")  # as before there were forms


# --- Objects365 ---


def test_objects365_without_a_patch_names_where_it_should_be(tmp_path: Path) -> None:
    write_objects365(tmp_path)
    shutil.rmtree(tmp_path / "train" / "patch0")
    split = load(tmp_path)
    with pytest.raises(HdovdError, match=r"image 2: .*/train/patch0/b2\.jpg: no such file"):
        [read_pixels(split, image) for image in split.images]
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(HdovdError, match=r"no image folder .*/train: "):
        load(tmp_path)


# --- Pascal VOC ---


def said_of(root: Path, split: str = "train") -> tuple[Split, str]:
    said: list[str] = []
    with lines_to(said.append):
        return load(root, split), "\n".join(said)


def test_voc_counts_from_0_where_a_box_does(tmp_path: Path) -> None:
    """Of both splits: e5, with a box from 0, is of the other one."""
    write_voc(tmp_path, first=0)
    assert boxes_of(load(tmp_path)) == expected("train")
    write_voc(tmp_path / "one")
    found, said = said_of(tmp_path / "one")
    assert "boxes count from 1" in said
    file = tmp_path / "one" / "Annotations" / "e5.xml"
    file.write_text(file.read_text().replace("<xmin>1</xmin>", "<xmin>0</xmin>"))
    found, said = said_of(tmp_path / "one")
    assert f"boxes count from 0, as one of {file} does" in said
    assert boxes_of(found)["b2"][2] == [("cat", 2.0, 3.0, 3.0, 5.0), ("dog", 5.0, 9.0, 12.0, 24.0)][:2]


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    write_voc(tmp_path)
    width, height, boxes = WORLD["train"]["a1"]
    (tmp_path / "Annotations" / "a1.xml").write_text(xml(width, height, boxes, difficult=[0]))
    found = load(tmp_path)
    assert [kind for kind, *_ in boxes_of(found)["a1"][2]] == ["zebra"]
    tree = json.loads(found.annotations.read_text())
    assert [one["iscrowd"] for one in tree["annotations"]][:2] == [1, 0]
    assert [Path(one["file_name"]).stem for one in tree["images"]] == ["a1", "b2", "c.3"]


def test_no_validation_picture_of_voc_is_trained_on(tmp_path: Path) -> None:
    """VOC 2012 has no annotations of its test pictures, and its trainval holds val."""
    write_voc(tmp_path)
    write_list(tmp_path, "trainval", [*WORLD["train"], *WORLD["val"]])
    write_list(tmp_path, "test", ["not_there"])
    assert boxes_of(load(tmp_path)) == expected("train")
    assert boxes_of(load(tmp_path, "val")) == expected("val")


def test_several_years_of_voc_are_one_data_set(tmp_path: Path) -> None:
    """2007 with test; of 2012 all that has annotations is trained on."""
    write_voc(tmp_path / "VOC2007", lists=("trainval", "test"))
    write_voc(tmp_path / "VOC2012")
    write_list(tmp_path / "VOC2012", "trainval", [*WORLD["train"], *WORLD["val"]])
    assert [image.file_name for image in load(tmp_path, "val").images] == [
        f"VOC2007/JPEGImages/{name}.jpg" for name in WORLD["val"]
    ]
    assert len(load(tmp_path).images) == 3 + 5


def test_a_picture_of_voc_without_a_size_or_objects(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations" / "a1.xml").write_text(xml(0, 0, WORLD["train"]["a1"][2]))
    (tmp_path / "Annotations" / "b2.xml").write_text("<annotation/>")
    found = load(tmp_path)
    assert boxes_of(found)["a1"] == expected("train")["a1"]
    assert found.empty == [number_of(found, "b2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", r"b2\.xml is not valid XML \(.*\); is the download complete"),
        ("", r"b2\.xml is not valid XML"),
        ("<html/>", r"b2\.xml begins with <html>, expected Pascal VOC's <annotation>"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            r"b2\.xml: object 1: bndbox holds nothing, nothing",
        ),
        (
            xml(9, 9, [("cat", 1, 2, 3, 4)]).replace("<ymin>3", "<ymin>three"),
            r"object 1: bndbox holds 2, three, 3, 4; exp",
        ),
        (xml(9, 9, [("cat", 1, 2, 3, "nan")]), r"object 1: bndbox holds 2, 3, 3, nan; expected the numbers xmin, ymin"),
        (xml(9, 9, [("", 1, 2, 3, 4)]), r"b2\.xml: object 1: name is the text '', expected a name"),
        (
            '<!DOCTYPE a [<!ENTITY b "cat">]>' + xml(9, 9, [("&b;", 1, 2, 3, 4)]),
            r"b2\.xml declares a document type or entities, which are not read",
        ),
    ],
    ids=["cut", "empty", "html", "no box", "word", "nan", "no name", "entity"],
)
def test_annotations_of_voc_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations" / "b2.xml").write_text(text)
    with pytest.raises(HdovdError, match=message):
        load(tmp_path)


def test_entities_in_another_encoding_are_refused_too(tmp_path: Path) -> None:
    write_voc(tmp_path)
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "cat">]><annotation/>'
    (tmp_path / "Annotations" / "b2.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(HdovdError, match=r"b2\.xml is no text file in UTF-8"):
        load(tmp_path)


@pytest.mark.parametrize("gone", ["JPEGImages/b2.jpg", "Annotations/b2.xml"])
def test_a_list_of_voc_that_names_what_is_not_there(tmp_path: Path, gone: str) -> None:
    write_voc(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(
        HdovdError, match=r"ImageSets/Main lists the text 'b2', which is not both in .*JPEGImages and in"
    ):
        load(tmp_path)


def test_a_list_of_voc_stays_within_it(tmp_path: Path) -> None:
    write_voc(tmp_path / "other")
    write_voc(tmp_path / "mine")
    write_list(tmp_path / "mine", "train", ["../../other/Annotations/a1"])
    with pytest.raises(HdovdError, match=r"lists the text '\.\./\.\./other/Annotations/a1', which is not"):
        load(tmp_path / "mine")


# --- YOLO ---


@pytest.mark.parametrize(
    "settings",
    [
        "train: images/train\nval: images/val\n",
        "path: /home/its/author\ntrain: images/train\nval: images/val\n",
        "path: images\ntrain: train\nval: [val]\n",
        "train: ../images/train\nval: ../images/val\n",
        "train: train.txt\nval: lists/val.txt\n",
        "train: [images/train, train.txt]\nval: images/val\nnc: 3\n",
    ],
    ids=["no path", "path elsewhere", "path", "Roboflow's", "lists", "both"],
)
def test_yolo_names_its_pictures(tmp_path: Path, settings: str) -> None:
    write_yolo(tmp_path, settings)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "val.txt").write_text("\n".join(f"../images/val/{name}.jpg" for name in WORLD["val"]))
    (tmp_path / "train.txt").write_text("".join(f"{tmp_path}/images/train/{name}.jpg\n\n" for name in WORLD["train"]))
    (tmp_path / "images" / "train" / "notes.txt").write_text("no picture")
    for split in SPLITS:
        assert alike(boxes_of(load(tmp_path, split)), expected(split))


def test_labels_of_yolo_beside_the_pictures_and_names_as_a_list(tmp_path: Path) -> None:
    """Where no folder within the data set is called images."""
    (tmp_path / "set").mkdir()
    write_yolo(tmp_path / "set" / "images")
    root = tmp_path / "set" / "images"
    for split in SPLITS:
        for file in [*(root / "labels" / split).iterdir(), *(root / "images" / split).iterdir()]:
            (root / split).mkdir(exist_ok=True)
            file.rename(root / split / file.name)
    (root / "data.yaml").write_text("train: train\nval: val\nnames: [cat, dog, zebra]\n")
    assert alike(boxes_of(load(root)), expected("train"))


def test_polygons_of_yolo_and_pictures_without_labels(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a1.txt").write_text("0 0.25 0.5 0.5 0.125 0.75 0.5 0.5 1.0\n")
    (tmp_path / "labels" / "train" / "b2.txt").unlink()
    found = load(tmp_path)
    assert boxes_of(found)["a1"][2] == [("cat", 16.0, 6.0, 48.0, 48.0)]
    assert found.empty == [number_of(found, "b2")]


def test_a_box_of_yolo_that_sticks_out_by_rounding_is_cut(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a1.txt").write_text("0 0.0625 0.5 0.1265 1.0005\n")
    found = load(tmp_path)
    ((kind, *box),) = boxes_of(found)["a1"][2]
    assert (kind, box) == ("cat", [0.0, 0.0, pytest.approx(64 * 0.12575), 48.0])
    assert json.loads(found.annotations.read_text())["annotations"][0]["bbox"] == pytest.approx(box)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", r"of class 3, but data\.yaml names 3, from 0 to 2"),
        ("-1 0.5 0.5 0.1 0.1", r"of class -1, but"),
        ("0.5 0.5 0.5 0.1 0.1", r"of class 0\.5, but"),
        ("0 0.5 0.5 1.1 0.1", r"expected 'class cx cy w h' or .*within 0 to 1"),
        ("0 0.9 0.5 0.3 0.1", r"expected 'class cx cy w h'"),
        ("0 0.1 0.5 0.3 0.1", r"expected 'class cx cy w h'"),
        ("0 0.5 0.5 -0.1 0.1", r"expected 'class cx cy w h'"),
        ("0 0.5 0.5 nan 0.1", r"expected 'class cx cy w h'"),
        ("0 320 240 64 48", r"expected 'class cx cy w h'"),
        ("0 0.5 0.5 0.1", r"expected 'class cx cy w h'"),
        ("0", r"expected 'class cx cy w h'"),
        ("0 0.5 0.5 0.1 0.1 0.9", r"expected 'class cx cy w h'"),
        ("cat 0.5 0.5 0.1 0.1", r"expected 'class cx cy w h'"),
    ],
)
def test_labels_of_yolo_that_cannot_be_read(tmp_path: Path, line: str, message: str) -> None:
    write_yolo(tmp_path)
    label = tmp_path / "labels" / "train" / "b2.txt"
    label.write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(HdovdError, match=rf"b2\.txt: line 3 is the text '{line}', {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", r"data\.yaml is not valid YAML"),
        ("train: !!python/object/apply:os.system [echo]", r"data\.yaml is not valid YAML \(could not determine"),
        ("train", r"data\.yaml holds the text 'train', expected names, train and val"),
        ("train: images/train", r"data\.yaml: names is null, expected a list of names"),
        (
            "train: images/train\nnames: {1: cat, 2: dog}",
            r"names is an object, expected a list of names, or names by number",
        ),
        ("train: images/train\nnames: [cat, 3]", r"data\.yaml: names: 1 is 3, expected a name"),
        (
            "train: images/nowhere\nnames: [cat]",
            r"train: the text 'images/nowhere': there is no .*images/nowhere, expected",
        ),
        ("train: 3\nnames: [cat]", r"data\.yaml: train is 3, expected a name"),
        ("train: images\nnames: [cat]", r"data\.yaml: no picture of train has labels, such as .*/labels/other/x\.txt"),
        ("train: empty\nnames: [cat]", r"data\.yaml: no picture of train has labels"),
        ("train: list.txt\nnames: [cat]", r"the text 'list\.txt': .*images/gone\.jpg is no picture in"),
        (
            "train: outside.txt\nnames: [cat]",
            r"outside\.txt': .*/x\.jpg is no picture in .*: give the folder that holds all",
        ),
        (
            "train: ../beside\nnames: [cat]",
            r"\.\./beside': .*/x\.jpg is no picture in .*: give the folder that holds all",
        ),
        (
            "path: ..\ntrain: beside\nnames: [cat]",
            r"beside': .*/x\.jpg is no picture in .*: give the folder that holds all",
        ),
    ],
)
def test_settings_of_yolo_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    root = tmp_path / "set"
    picture(root / "images" / "other" / "x.jpg", 9, 9)
    picture(tmp_path / "beside" / "x.jpg", 9, 9)
    (root / "empty").mkdir()
    (root / "list.txt").write_text("images/other/x.jpg\nimages/gone.jpg\n")
    (root / "outside.txt").write_text(f"{tmp_path}/beside/x.jpg\n")
    (root / "data.yaml").write_text(text)
    with pytest.raises(HdovdError, match=message):
        load(root)


@pytest.mark.parametrize("key", ["train", "path", "names"])
def test_a_yaml_that_grows_is_not_written_out(tmp_path: Path, key: str) -> None:
    """Each list holds the one before nine times: 9^12 entries."""
    lines = ["l0: &l0 [a]", *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 13))]
    settings = {"train": "images/train", "path": ".", "names": "[cat]"} | {key: "[*l12]"}
    (tmp_path / "data.yaml").write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in settings.items())]))
    picture(tmp_path / "images" / "train" / "x.jpg", 9, 9)
    with pytest.raises(HdovdError, match=rf"data\.yaml: {key}(: 0)? is a list, expected a name"):
        load(tmp_path)


def test_a_picture_that_lies_on_its_side_is_as_wide_as_it_is_upright(tmp_path: Path) -> None:
    """YOLO's labels are of pictures as its tools show them."""
    write_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "images" / "train" / "a1.jpg", exif=exif)
    found = load(tmp_path)
    assert alike(boxes_of(found), expected("train"))
    assert read_pixels(found, found.images[0]).shape == (3, 48, 64)
    (tmp_path / "images" / "train" / "a1.jpg").write_bytes(b"no picture")
    with pytest.raises(HdovdError, match=r"a1\.jpg: no picture of a kind that Pillow reads"):
        load(tmp_path)


# --- labelling tools ---


ODD = [
    region(40, 50, "cat", (20, 10, 30, 20), rotation=90),  # about its upper left corner: (10..20, 10..20)
    {**region(40, 50, "zebra", (0, 0, 0, 0)), "type": "polygonlabels"},
    {**region(40, 50, "cat", (0, 0, 9, 9)), "type": "brushlabels"},
    region(40, 50, "cat", (0, 0, 9, 9), rectanglelabels=["cat", "dog"]),
    {"type": "choices", "value": {"choices": ["sunny"]}},
    {"type": "relation", "from_id": "r0", "to_id": "r1"},
]
ODD[1]["value"] = {"points": [[25, 10], [50, 20], [37.5, 40]], "polygonlabels": ["zebra"]}
ODD[2]["value"] = {"format": "rle", "rle": [0, 1], "brushlabels": ["cat"]}


def test_what_is_no_upright_rectangle_of_label_studio_is_told(tmp_path: Path) -> None:
    write_label_studio(tmp_path)
    write_json(tmp_path / "train" / "project-3-at-2026-01-01-00-00-0a1b2c3d.json", [task("images/b2.jpg", ODD)])
    found, said = said_of(tmp_path)
    assert boxes_of(found)["b2"][2] == [
        ("cat", *map(pytest.approx, (10, 10, 20, 20))),
        ("zebra", *map(pytest.approx, (10, 5, 20, 20))),
    ]
    for line in (
        "(train2017): 1 taken as the upright box around each: rectanglelabels (images/b2.jpg)",
        "1 taken as the upright box around each: polygonlabels",
        "1 left out: brushlabels (images/b2.jpg)",
        "1 left out: rectanglelabels of 2 labels",
        "1 left out: choices",
        "1 left out: relation",
    ):
        assert line in said


def test_of_several_annotations_the_ground_truth_counts_or_the_last(tmp_path: Path) -> None:
    write_label_studio(tmp_path)
    rectangles = [region(40, 50, "cat", (0, 0, side, side)) for side in (10, 20, 30, 40)]
    many = task("b2.jpg", rectangles[:1])
    many["annotations"] += [task("", [one])["annotations"][0] for one in rectangles[1:3]]
    many["annotations"] += task("", rectangles[3:], was_cancelled=True)["annotations"]
    open_task = {**task("c.3.jpg", []), "annotations": [], "predictions": task("", rectangles[:1])["annotations"]}
    file = tmp_path / "train" / "project-3-at-2026-01-01-00-00-0a1b2c3d.json"
    write_json(file, [many, open_task, task("a1.jpg", [])])
    found, said = said_of(tmp_path)
    assert boxes_of(found) == {"b2": (40, 50, [("cat", 0, 0, *map(pytest.approx, (30, 30)))])}
    assert found.empty == [number_of(found, "a1")]  # a finished annotation of nothing, whose size is the picture's own
    assert "1 pictures left out, without a finished annotation (c.3.jpg)" in said
    assert "1 pictures of several annotations, of which the ground truth counts, or the last (b2.jpg)" in said
    many["annotations"][0]["ground_truth"] = True
    write_json(file, [many, {**many, "annotations": task("", rectangles[1:2])["annotations"]}, many])
    found, said = said_of(tmp_path)
    assert boxes_of(found)["b2"][2][0][3] == pytest.approx(10)
    assert "2 pictures that stand several times, of which the last counts" in said


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"images": [], "annotations": [{"id": 1}], "categories": []},
            r"no export of Label Studio: expected a list of task",
        ),
        ([3], r"\.json: number 1 is not as its tool writes it \(AttributeError"),
        ([{"data": {"text": "a cat"}, "annotations": []}], r"number 1 names 0 pictures, expected one"),
        ([{"data": {"a": "x.jpg", "b": "y.jpg"}, "annotations": []}], r"number 1 names 2 pictures, expected one"),
        ([task("b2.jpg", [region(40, 50, "", (0, 0, 1, 1))])], r"number 1: label is the text '', expected a name"),
        ([task("b2.jpg", [region(40, 50, "cat", (0, 0, 1, float("nan")))])], r"not as its tool writes.*not finite"),
        (
            [task("b2.jpg", [region(40, 50, "cat", (0, 0, 1, 1), x="3")])],
            r"number 1 is not as its tool writes it \(TypeErr",
        ),
        (
            [task("b2.jpg", [{"value": {"rectanglelabels": ["cat"]}}])],
            r"not as its tool writes it \(KeyError\('original_w",
        ),
        (
            [task("gone.jpg", []), task("b2.jpg", [])],
            r"1 of 2 pictures of train2017 are not there \(gone\.jpg\): put them in",
        ),
        ([task(f"{'a' * 300}.jpg", [])], r"1 of 1 pictures of train2017 are not there"),
        (
            [task("s3://one/b2.jpg", []), task("s3://two/b2.jpg", [])],
            r"number 2: pictures .*b2\.jpg and .*b2\.jpg are both images/b2\.jpg here",
        ),
        ([], r"hold no finished picture of training"),
        ([task("images/../images/b2.jpg", [])], r"1 of 1 pictures of train2017 are not there"),
        (
            [
                task(
                    "b2.jpg",
                    [region(40, 50, "cat", (0, 0, 1, 1)), {**region(4, 5, "far", (0, 0, 1, 1)), "from_name": "size"}],
                )
            ],
            r"boxes have labels of several lists \(label, size\), but classes are of one",
        ),
    ],
    ids=[
        "coco",
        "number",
        "text",
        "two",
        "no label",
        "nan",
        "word",
        "no size",
        "gone",
        "long",
        "same",
        "empty",
        "outside",
        "lists",
    ],
)
def test_exports_of_label_studio_that_cannot_be_read(tmp_path: Path, tree: Any, message: str) -> None:
    picture(tmp_path / "images" / "b2.jpg", 40, 50)
    write_json(tmp_path / "project-1-at-x.json", tree)
    with pytest.raises(HdovdError, match=message):
        load(tmp_path)


def test_the_picture_of_a_task_is_called_image_where_there_are_several(tmp_path: Path) -> None:
    write_label_studio(tmp_path)
    one = task("s3://bucket/some/where/b2.jpg?X-Signature=1", [region(40, 50, "cat", (0, 0, 10, 10))])
    one["data"] = {"name": "IMG_1.jpg"} | one["data"]
    write_json(tmp_path / "train" / "project-3-at-2026-01-01-00-00-0a1b2c3d.json", [one])
    assert [image.file_name for image in load(tmp_path).images] == ["train/images/b2.jpg"]


def test_pictures_are_found_by_what_their_addresses_say(tmp_path: Path) -> None:
    """Of Windows, with a number sign, with a query of their own, beside other texts of a task."""
    names = {"b2.jpg": "/data/local-files/?d=set%5Cb2.jpg", "a#1.jpg": "/data/upload/1/0a1b2c3d-a#1.jpg"}
    names |= {"q.jpg": "https://x/q.jpg?d=5"}
    for name in names:
        picture(tmp_path / "images" / name, 40, 50)
    tasks = [task(address, []) for address in names.values()]
    tasks[0]["data"]["note"] = "//[draft] not an address"
    write_json(tmp_path / "project-1-at-x.json", tasks)
    (made,) = [load_annotations(tmp_path)]
    assert made == sorted(f"images/{name}" for name in names)
    (tmp_path / "images" / "q.jpg").rename(tmp_path / "q.jpg")  # converted anew
    assert load_annotations(tmp_path) == ["images/a#1.jpg", "images/b2.jpg", "q.jpg"]


def load_annotations(root: Path) -> list[str]:
    file = LABEL_STUDIO.annotations(root, "train2017")
    return sorted(image["file_name"] for image in json.loads(file.read_text())["images"])


def test_subsets_of_cvat_are_splits(tmp_path: Path) -> None:
    """As projects are exported, with pictures in folders of their subsets."""
    text = ""
    for split, subset in (("train", "Train"), ("val", "Validation")):
        for name, (width, height, boxes) in WORLD[split].items():
            picture(tmp_path / "images" / subset / "deep" / f"{name}.jpg", width, height)
            shapes = "".join(shape(kind, box) for kind, *box in boxes)
            text += cvat([(f"deep/{name}.jpg", width, height, shapes)], f'subset="{subset}" task_id="4"')
    (tmp_path / "annotations.xml").write_text(text.replace("</annotations><annotations>", ""))
    for split in SPLITS:
        assert boxes_of(load(tmp_path, split)) == expected(split)
    assert load(tmp_path).images[0].file_name == "images/Train/deep/a1.jpg"


def test_what_is_no_upright_box_of_cvat_is_told(tmp_path: Path) -> None:
    write_cvat(tmp_path)
    odd = shape("cat", (10, 20, 30, 24), ' rotation="90.0"')  # about its middle: (18..22, 12..32)
    odd += '<polygon label="zebra" points="10.0,5.0;20.0,10.0;15,20" z_order="0"/>'
    odd += '<mask label="cat" rle="1"/><tag label="dog"/>'
    (tmp_path / "train" / "annotations.xml").write_text(cvat([("b2.jpg", 40, 50, odd)]))
    found, said = said_of(tmp_path)
    assert boxes_of(found)["b2"][2] == [("cat", *map(pytest.approx, (18, 12, 22, 32))), ("zebra", 10, 5, 20, 20)]
    for line in (
        "1 taken as the upright box around each: box (train/b2.jpg)",
        "taken as the upright box around each: polygon",
        "1 left out: mask",
        "1 left out: tag",
    ):
        assert line.replace("train/", "") in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation/>", r"xml begins with <annotation>, expected CVAT's <annotations>"),
        ("<annotations>", r"annotations\.xml is not valid XML"),
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotations>&b;</annotations>',
            r"declares a document type or entities, which are not read",
        ),
        (
            "<annotations><track id='0' label='cat'/></annotations>",
            r"number 1 is a track of a video: export it as CVAT for im",
        ),
        (cvat([("b2.jpg", 40, 50, "<box/>")]), r"number 3 is not as its tool writes it \(KeyError\('xtl'\)\)"),
        (cvat([("b2.jpg", 40, 50, shape("cat", (0, 0, float("inf"), 3)))]), r"number 3 is not as its tool.*not finite"),
        (
            cvat([("b2.jpg", 40, 50, '<polygon label="cat" points="1,2,3"/>')]),
            r"number 3 is not as its tool writes it \(ValueE",
        ),
        (cvat([("b2.jpg", 40, 50, shape("", (0, 0, 3, 3)))]), r"number 3: label is the text '', expected a name"),
        (
            cvat([("b2.jpg", 40, 50, "")]).replace('"40"', '"wide"'),
            r"number 3 is not as its tool writes it \(ValueError",
        ),
        (cvat([("gone.jpg", 40, 50, "")]), r"1 of 1 pictures of train2017 are not there \(gone\.jpg\)"),
    ],
    ids=["voc", "cut", "entity", "video", "no sides", "infinite", "points", "no label", "size", "gone"],
)
def test_exports_of_cvat_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path / "images" / "b2.jpg", 40, 50)
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(HdovdError, match=message):
        load(tmp_path)


def test_classes_that_the_protocol_does_not_name_are_told(tmp_path: Path) -> None:
    write_cvat(tmp_path)
    file = tmp_path / "train" / "annotations.xml"
    file.write_text(file.read_text().replace('<box label="dog"', '<box label="dgo"'))
    found, said = said_of(tmp_path)
    assert re.search(r"note: .*\.json: 1 box is of classes that protocol mine does not name: dgo", said)
    assert "dgo" not in {kind for *_, boxes in boxes_of(found).values() for kind, *_ in boxes}


# --- conversion ---


def test_annotations_are_converted_once_and_to_the_same_bytes(tmp_path: Path) -> None:
    for form in ("voc", "yolo", "label-studio", "cvat"):
        write = WRITERS[form]
        first, again = tmp_path / form, tmp_path / f"{form} again"
        write(first)
        found, said = said_of(first)
        assert f"converting the annotations of {first} (train2017) to COCO's form" in said
        assert found.annotations.parent == user_cache_folder() / "data"
        same, said = said_of(first)
        assert (same.annotations, "converting" in said) == (found.annotations, False)
        write(again)
        assert load(again).annotations != found.annotations
        assert load(again).annotations.read_bytes() == found.annotations.read_bytes()


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("voc", "Annotations/a1.xml"),
        ("voc", "ImageSets/Main/train.txt"),
        ("yolo", "labels/train/a1.txt"),
        ("yolo", "data.yaml"),
        ("yolo", "images/train/a1.jpg"),
        ("label-studio", "val/project-3-at-2026-01-01-00-00-0a1b2c3d.json"),
        ("cvat", "train/annotations.xml"),
    ],
)
def test_annotations_that_changed_are_converted_again(tmp_path: Path, form: str, file: str) -> None:
    WRITERS[form](tmp_path)
    before = load(tmp_path).annotations
    if file == "ImageSets/Main/train.txt":
        write_list(tmp_path, "train", ["a1"])
    else:
        os.utime(tmp_path / file, ns=(1, 1))
    after = load(tmp_path).annotations
    assert (after != before, before.is_file()) == (True, True)


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_a_picture_keeps_its_number_when_others_go(tmp_path: Path, form: str) -> None:
    """Proposals, captions and cached rows are of numbers."""
    {"voc": write_voc, "yolo": write_yolo}[form](tmp_path)
    before = {image.file_name: image for image in load(tmp_path).images}
    first, *_, last = sorted(before)
    if form == "voc":
        write_list(tmp_path, "train", [Path(name).stem for name in before if name != first])
    else:
        (tmp_path / first).unlink()
    after = {image.file_name: image for image in load(tmp_path).images}
    assert after.keys() == before.keys() - {first}
    for name, image in after.items():
        assert image.id == before[name].id
        assert image.annotation_ids.tolist() == before[name].annotation_ids.tolist()
    assert after[last].id < 2**53


def test_validation_that_cannot_be_converted_is_told_and_training_goes_on(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text((tmp_path / "data.yaml").read_text().replace("images/val", "images/gone"))
    given = {"data": tmp_path, "val_images": None, "val_annotations": None, "form": "auto"}
    lines = list[str]()
    with lines_to(lines.append):
        assert validation_of(given) is None
    assert any("note: val2017 cannot be used: " in line and "images/gone" in line for line in lines)
    assert load(tmp_path).images


def test_a_picture_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    for file in sorted(tmp_path.rglob("a1.*")):
        file.rename(file.with_name(os.fsdecode(b"caf\xe9") + file.suffix))
    with pytest.raises(HdovdError, match=r"image \d+: file_name is .*caf\\udce9\.jpg', .* cannot be printed"):
        load(tmp_path)


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    write_voc(tmp_path / "voc")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            load(tmp_path / "voc")
    assert [*(tmp_path / "kept" / "hdovd" / "data").iterdir()] == []
    assert boxes_of(load(tmp_path / "voc")) == expected("train")
