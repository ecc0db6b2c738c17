"""Annotation files: what a protocol may see, which boxes are left out, and what is said of a bad file."""

import json
import tracemalloc
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.coco import DataPaths, Skips, Split, clip_box, load_split
from hdovd.errors import HdovdError
from hdovd.protocol import Protocol

PROTOCOL = Protocol("mine", ("zebra", "cat"), ("dog",))
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 90, "name": "zebra"}, {"id": 1, "name": "ignored"}]
CAT, DOG, ZEBRA, IGNORED = 7, 2, 90, 1


def image(image_id: int, width: int = 100, height: int = 80) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id:04d}.jpg", "width": width, "height": height}


def annotation(annotation_id: int, image_id: int, category: int, bbox: Any = (10, 20, 30, 40), **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": category, "bbox": list(bbox) if isinstance(bbox, tuple) else bbox,
            "iscrowd": 0, **more}


def write(folder: Path, images: list[Any], annotations: list[Any], categories: list[Any] = CATEGORIES) -> Path:
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def load(folder: Path, images: list[Any], annotations: list[Any], *, base_only: bool = True, categories: list[Any] = CATEGORIES) -> Split:
    return load_split(write(folder, images, annotations, categories), folder, PROTOCOL, base_only=base_only)


def test_base_only_sees_base_boxes_alone(tmp_path: Path) -> None:
    split = load(tmp_path, [image(5), image(3), image(4), image(6), image(8)], [
        annotation(1, 3, CAT), annotation(2, 3, DOG), annotation(3, 5, ZEBRA, (0, 0, 50, 60)), annotation(4, 3, ZEBRA, (1, 2, 3, 4)),
        annotation(5, 4, DOG), annotation(6, 6, CAT, iscrowd=1), annotation(7, 3, CAT, iscrowd=1), annotation(8, 5, IGNORED)])
    assert [i.id for i in split.images] == [5, 3]  # file order; no base box in 4, 6 and 8
    five, three = split.images
    assert (five.file_name, five.width, five.height) == ("0005.jpg", 100, 80)
    assert five.boxes.tolist() == [[0, 0, 50, 60]]
    assert five.labels.tolist() == [0]
    assert three.boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6]]
    assert three.labels.tolist() == [1, 0]
    assert three.annotation_ids.tolist() == [1, 4]
    assert (three.boxes.dtype, three.labels.dtype, three.annotation_ids.dtype) == (np.float32, np.int64, np.int64)
    assert split.coco_ids == (ZEBRA, CAT, DOG)
    assert split.path(three) == tmp_path / "0003.jpg"
    assert split.skips.by_reason == {}


def test_evaluation_sees_all_classes_of_the_protocol(tmp_path: Path) -> None:
    split = load(tmp_path, [image(1), image(2), image(3), image(4, 20, 20), image(5)], [
        annotation(1, 1, CAT), annotation(2, 2, DOG), annotation(3, 3, IGNORED), annotation(4, 4, DOG, (0, 0, 5, 5)),
        annotation(5, 5, CAT, iscrowd=1), annotation(6, 1, IGNORED), annotation(7, 1, DOG)], base_only=False)
    assert [i.id for i in split.images] == [1, 2, 4, 5]  # small images stay, an image with a crowd has an annotation
    assert [i.labels.tolist() for i in split.images] == [[1, 2], [2], [2], [1]]


@pytest.mark.parametrize(("width", "height", "kept"), [(32, 32, True), (31, 200, False), (200, 31, False)])
def test_images_with_a_side_under_32_are_left_out_of_training(tmp_path: Path, width: int, height: int, kept: bool) -> None:
    split = load(tmp_path, [image(1), image(2, width, height)], [annotation(1, 1, CAT), annotation(2, 2, CAT, (1, 1, 9, 9))])
    assert [i.id for i in split.images] == ([1, 2] if kept else [1])
    assert list(split.skips.by_reason.values()) == ([] if kept else [[2]])
    if not kept:
        assert any("32 px" in line and "skipped 1" in line for line in split.skips.lines())


def test_the_minimum_side_is_the_protocols(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1, 20, 20)], [annotation(1, 1, CAT, (1, 1, 9, 9))])
    small = Protocol("mine", PROTOCOL.base, PROTOCOL.novel, min_image_side_px=8)
    assert len(load_split(file, tmp_path, small, base_only=True).images) == 1


BAD_BOXES = [
    ((100, 10, 20, 20), "outside"), ((-30, 10, 20, 20), "outside"), ((10, 80, 5, 5), "outside"), ((10, -9, 5, 5), "outside"),
    ((10, 10, 0, 5), "no area"), ((10, 10, 5, 0), "no area"), ((10, 10, 0.0, 0.0), "no area"),
    ((float("nan"), 1, 2, 3), "not finite"), ((1, 1, float("inf"), 3), "not finite"), ((1, 1, 3, float("nan")), "not finite"),
    ((10, 10, -5, 5), "inverted"), ((10, 10, 5, -5), "inverted"), ((10, 10, -5, -5), "inverted"),
    ((1, 2, 3), "four numbers"), ((1, 2, 3, 4, 5), "four numbers"), ("1 2 3 4", "four numbers"), (None, "four numbers"),
    ((1, 2, "3", 4), "four numbers"), ((1, 2, None, 4), "four numbers"), ({"x": 1}, "four numbers"),
]


@pytest.mark.parametrize(("bbox", "reason"), BAD_BOXES)
@pytest.mark.parametrize("base_only", [True, False])
def test_a_bad_box_is_left_out_and_counted(tmp_path: Path, bbox: Any, reason: str, base_only: bool) -> None:
    split = load(tmp_path, [image(1), image(2)], [annotation(11, 1, CAT), annotation(12, 1, CAT, bbox), annotation(13, 2, CAT, bbox)],
                 base_only=base_only)
    assert [i.id for i in split.images] == [1]  # the other has no box left
    assert split.images[0].annotation_ids.tolist() == [11]
    (found, ids), = split.skips.by_reason.items()
    assert reason in found
    assert ids == [12, 13]
    assert any("skipped 2" in line and reason in line and "12, 13" in line for line in split.skips.lines())


@pytest.mark.parametrize(("bbox", "expected"), [
    ((-5, -6, 15, 26), [0, 0, 10, 20]), ((90, 70, 50, 50), [90, 70, 100, 80]), ((-1, -1, 200, 200), [0, 0, 100, 80]),
    ((10.25, 20.5, 30.5, 40.25), [10.25, 20.5, 40.75, 60.75])])
def test_a_box_is_clipped_to_the_image(tmp_path: Path, bbox: Any, expected: list[float]) -> None:
    split = load(tmp_path, [image(1)], [annotation(1, 1, CAT, bbox)])
    assert split.images[0].boxes.tolist() == [expected]
    assert split.skips.by_reason == {}


def test_clip_box_says_why() -> None:
    assert clip_box([1, 2, 3, 4], 10, 10) == ([1.0, 2.0, 4.0, 6.0], "")
    box, why = clip_box([1, 2, 0, 4], 10, 10)
    assert box is None
    assert "area" in why


@pytest.mark.parametrize("bbox", [(600.0, 10.0, 1e-6, 50.0), (10.0, 400.0, 50.0, 1e-6), (-1.0, 10.0, 1.0 + 1e-60, 20.0)])
def test_a_box_that_float32_cannot_hold_has_no_area(tmp_path: Path, bbox: Any) -> None:
    """Regression targets of a box without width are infinite."""
    split = load(tmp_path, [image(1, 640, 480)], [annotation(1, 1, CAT), annotation(2, 1, CAT, bbox)])
    sides = split.images[0].boxes[:, 2:] - split.images[0].boxes[:, :2]
    assert (sides > 0).all()
    assert list(split.skips.by_reason.values()) == [[2]]


def test_annotation_id_0_is_kept(tmp_path: Path) -> None:
    assert load(tmp_path, [image(0)], [annotation(0, 0, CAT)]).images[0].annotation_ids.tolist() == [0]


def test_an_annotation_without_iscrowd_is_no_crowd(tmp_path: Path) -> None:
    plain = annotation(1, 1, CAT)
    del plain["iscrowd"]
    assert len(load(tmp_path, [image(1)], [plain]).images[0].boxes) == 1


@pytest.mark.parametrize("order", list(permutations(["images", "annotations", "categories"])))
def test_the_parts_come_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    parts = {"images": [image(3), image(1)], "categories": CATEGORIES,
             "annotations": [annotation(1, 1, CAT), annotation(2, 3, ZEBRA, None), annotation(3, 3, DOG), annotation(4, 3, CAT, iscrowd=1),
                             annotation(5, 1, ZEBRA, (1, 2, 3, 4)), annotation(6, 3, CAT, (5, 5, 200, 5))]}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"info": {"images": 3}, **{key: parts[key] for key in order}, "licenses": [1]}))
    split = load_split(file, tmp_path, PROTOCOL, base_only=True)
    assert [i.id for i in split.images] == [3, 1]
    assert [i.annotation_ids.tolist() for i in split.images] == [[6], [1, 5]]
    assert [i.labels.tolist() for i in split.images] == [[1], [1, 0]]
    assert [i.boxes.tolist() for i in split.images] == [[[5, 5, 100, 10]], [[10, 20, 40, 60], [1, 2, 4, 6]]]
    assert list(split.skips.by_reason.values()) == [[2]]


def test_every_image_gets_its_own_rows(tmp_path: Path) -> None:
    """Against a plain reading of the file, with the annotations of all images mixed."""
    rng = np.random.default_rng(0)
    images = [image(int(i)) for i in rng.permutation(40)]
    annotations = [annotation(int(k), int(rng.integers(40)), int(rng.choice([CAT, DOG, ZEBRA, IGNORED])),
                              tuple(rng.uniform(-20, 90, 4).round(2).tolist()), iscrowd=int(rng.integers(5) == 0))
                   for k in rng.permutation(600)]
    for base_only in (True, False):
        split = load(tmp_path, images, annotations, base_only=base_only)
        label_of = {ZEBRA: 0, CAT: 1} | ({} if base_only else {DOG: 2})
        wanted = {i["id"]: [(a["id"], label_of[a["category_id"]], clip_box(a["bbox"], 100, 80)[0]) for a in annotations
                            if a["image_id"] == i["id"] and a["category_id"] in label_of and not (base_only and a["iscrowd"])
                            and clip_box(a["bbox"], 100, 80)[0] is not None] for i in images}
        assert {i.id: list(zip(i.annotation_ids.tolist(), i.labels.tolist(), i.boxes.tolist(), strict=True))
                for i in split.images} == {key: rows for key, rows in wanted.items() if rows}
        assert sum(map(len, split.skips.by_reason.values())) > 50


def test_outlines_are_not_kept_in_memory(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1)], [annotation(k, 1, CAT, segmentation=[[0.5 + k] * 1000]) for k in range(1500)])
    assert file.stat().st_size > 7_000_000
    tracemalloc.start()
    try:
        assert len(load_split(file, tmp_path, PROTOCOL, base_only=True).images[0].boxes) == 1500
        assert tracemalloc.get_traced_memory()[1] < 5_000_000  # some blocks of 1 MiB
    finally:
        tracemalloc.stop()


# Bad files.

def test_an_annotation_for_an_unknown_image(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json.*annotation 4 .*image 99"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(4, 99, CAT)])


def test_class_names_that_the_file_does_not_know(tmp_path: Path) -> None:
    renamed = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 90, "name": "zebras"}]
    with pytest.raises(HdovdError, match=r"mine.*instances\.json.*'zebra' \(the file has 'zebras'\).*--protocol"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=renamed)


@pytest.mark.parametrize("annotations", [[], [annotation(1, 1, DOG)], [annotation(1, 1, CAT, (10, 10, 0, 0))]])
def test_no_base_box_at_all(tmp_path: Path, annotations: list[Any]) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json holds no usable box.*zebra, cat"):
        load(tmp_path, [image(1)], annotations)


def test_no_base_box_left_says_what_was_skipped(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"(?s)no usable box.*skipped 1: .*no area"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT, (10, 10, 0, 0))])


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xfe\x00\x01"])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "instances.json"
    file.write_bytes(content)
    with pytest.raises(HdovdError, match=r"instances\.json is not valid JSON"):
        load_split(file, tmp_path, PROTOCOL, base_only=True)


@pytest.mark.parametrize("tree", [
    [], {}, {"images": [], "annotations": []}, 3, None, [{"images": [], "annotations": [], "categories": []}],
    {"images": [], "annotations": {"id": 1}, "categories": []}, {"images": [], "annotations": [], "categories": [[]]},
    {"images": [3], "annotations": [], "categories": []}, {"images": None, "annotations": [], "categories": []},
    {"images": [image(1)], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}])  # captions
def test_a_file_that_is_not_cocos(tmp_path: Path, tree: Any) -> None:
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"instances\.json is no COCO instances file"):
        load_split(file, tmp_path, PROTOCOL, base_only=True)


def test_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"nowhere\.json"):
        load_split(tmp_path / "nowhere.json", tmp_path, PROTOCOL, base_only=True)
    file = write(tmp_path, [image(1)], [annotation(1, 1, CAT)])
    with pytest.raises(HdovdError, match=r"no image folder.*nowhere"):
        load_split(file, tmp_path / "nowhere", PROTOCOL, base_only=True)


@pytest.mark.parametrize("key", ["id", "file_name", "width", "height"])
def test_an_image_without_a_key(tmp_path: Path, key: str) -> None:
    broken = {k: v for k, v in image(1).items() if k != key}
    with pytest.raises(HdovdError, match=rf"instances\.json.*{key}"):
        load(tmp_path, [broken], [])


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox"])
def test_an_annotation_without_a_key(tmp_path: Path, key: str) -> None:
    broken = {k: v for k, v in annotation(2, 1, CAT).items() if k != key}
    with pytest.raises(HdovdError, match=r"instances\.json"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT), broken])


def test_of_two_faults_the_first_is_named(tmp_path: Path) -> None:
    good, broken = annotation(1, 1, CAT), {"id": 8}
    with pytest.raises(HdovdError, match="twice"):
        load(tmp_path, [image(1)], [good, good, broken])
    with pytest.raises(HdovdError, match="annotation 8 lacks"):
        load(tmp_path, [image(1)], [good, broken, good, good])
    with pytest.raises(HdovdError, match="annotation number 1 lacks"):
        load(tmp_path, [image(1)], [good, {}, broken])
    with pytest.raises(HdovdError, match="does not know"):
        load(tmp_path, [image(1)], [broken], categories=CATEGORIES[:1])
    file = write(tmp_path, [image(1)], [broken])
    with pytest.raises(HdovdError, match="no image folder"):
        load_split(file, tmp_path / "nowhere", PROTOCOL, base_only=True)
    file.write_text(file.read_text()[:-1])
    with pytest.raises(HdovdError, match="not valid JSON"):
        load_split(file, tmp_path, PROTOCOL, base_only=True)


@pytest.mark.parametrize("key", ["id", "name"])
def test_a_category_without_a_key(tmp_path: Path, key: str) -> None:
    broken = [{k: v for k, v in c.items() if k != key} for c in CATEGORIES]
    with pytest.raises(HdovdError, match=r"instances\.json"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=broken)


def test_an_annotation_id_that_stands_twice(tmp_path: Path) -> None:
    """Cached rows are joined by annotation id."""
    with pytest.raises(HdovdError, match=r"instances\.json.*annotation id 1 .*twice"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(1, 1, CAT)])


def test_categories_of_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json.*same name.*" + CATEGORIES[0]["name"]):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=[*CATEGORIES, {"id": 99, "name": CATEGORIES[0]["name"]}])


def test_an_image_id_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json.*image id 1 .*twice"):
        load(tmp_path, [image(1), image(1)], [annotation(1, 1, CAT)])


def test_many_skips_are_shortened() -> None:
    skips = Skips()
    for item in range(20):
        skips.add("reason", item)
    line, = skips.lines()
    assert line.startswith("skipped 20: reason (0, 1, 2")
    assert "12 more" in line


# Where a data set lies.

def test_the_layout_of_coco_2017(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    write(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(2, 1, CAT, (1, 1, 0, 0))]).rename(file)
    said: list[str] = []
    split = DataPaths(tmp_path).load("train2017", PROTOCOL, base_only=True, log=said.append)
    assert split.path(split.images[0]) == tmp_path / "train2017" / "0001.jpg"
    assert split.annotations == file
    assert len(said) == 1
    assert "skipped 1" in said[0]


def test_images_and_annotations_override_the_layout(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1)], [annotation(1, 1, CAT)])
    split = DataPaths(None, tmp_path, file).load("train2017", PROTOCOL, base_only=True, log=lambda _: None)
    assert (split.folder, split.annotations) == (tmp_path, file)


def test_paths_that_do_not_suffice(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="--data ROOT"):
        DataPaths(None, tmp_path, None).load("train2017", PROTOCOL, base_only=True)
    with pytest.raises(HdovdError, match="nowhere: no such folder"):
        DataPaths(tmp_path / "nowhere").load("train2017", PROTOCOL, base_only=True)
    with pytest.raises(HdovdError, match=r"instances_val2017\.json"):
        DataPaths(tmp_path).load("val2017", PROTOCOL, base_only=False)
