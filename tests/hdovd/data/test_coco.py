"""Annotation files: what a protocol may see, which boxes are left out, and what is said of a bad file."""

import gzip
import json
import tracemalloc
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Protocol, Skips, Split, load_split
from hdovd.data.coco import clip_box
from hdovd.pipelines.common.options import validation_of

PROTOCOL = Protocol("mine", ("zebra", "cat"), ("dog",))
CATEGORIES = [
    {"id": 7, "name": "cat"},
    {"id": 2, "name": "dog"},
    {"id": 90, "name": "zebra"},
    {"id": 1, "name": "ignored"},
]
CAT, DOG, ZEBRA, IGNORED = 7, 2, 90, 1


def image(image_id: int, width: int = 100, height: int = 80) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id:04d}.jpg", "width": width, "height": height}


def annotation(
    annotation_id: int, image_id: int, category: int, bbox: Any = (10, 20, 30, 40), **more: Any
) -> dict[str, Any]:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category,
        "bbox": list(bbox) if isinstance(bbox, tuple) else bbox,
        "iscrowd": 0,
        **more,
    }


def write(folder: Path, images: list[Any], annotations: list[Any], categories: list[Any] = CATEGORIES) -> Path:
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def load(
    folder: Path,
    images: list[Any],
    annotations: list[Any],
    *,
    base_only: bool = True,
    categories: list[Any] = CATEGORIES,
) -> Split:
    return load_split(write(folder, images, annotations, categories), folder, PROTOCOL, base_only=base_only)


def test_base_only_sees_base_boxes_alone(tmp_path: Path) -> None:
    split = load(
        tmp_path,
        [image(5), image(3), image(4), image(6), image(8)],
        [
            annotation(1, 3, CAT),
            annotation(2, 3, DOG),
            annotation(3, 5, ZEBRA, (0, 0, 50, 60)),
            annotation(4, 3, ZEBRA, (1, 2, 3, 4)),
            annotation(5, 4, DOG),
            annotation(6, 6, CAT, iscrowd=1),
            annotation(7, 3, CAT, iscrowd=1),
            annotation(8, 5, IGNORED),
        ],
    )
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
    assert split.empty == [4, 6, 8]
    assert split.path(three) == tmp_path / "0003.jpg"
    assert split.skips.by_reason == {}


def test_evaluation_sees_all_classes_of_the_protocol(tmp_path: Path) -> None:
    split = load(
        tmp_path,
        [image(1), image(2), image(3), image(4, 20, 20), image(5)],
        [
            annotation(1, 1, CAT),
            annotation(2, 2, DOG),
            annotation(3, 3, IGNORED),
            annotation(4, 4, DOG, (0, 0, 5, 5)),
            annotation(5, 5, CAT, iscrowd=1),
            annotation(6, 1, IGNORED),
            annotation(7, 1, DOG),
        ],
        base_only=False,
    )
    assert [i.id for i in split.images] == [1, 2, 4, 5]  # small images stay, an image with a crowd has an annotation
    assert [i.labels.tolist() for i in split.images] == [[1, 2], [2], [2], [1]]


@pytest.mark.parametrize(("width", "height", "kept"), [(32, 32, True), (31, 200, False), (200, 31, False)])
def test_images_with_a_side_under_32_are_left_out_of_training(
    tmp_path: Path, width: int, height: int, kept: bool
) -> None:
    split = load(
        tmp_path, [image(1), image(2, width, height)], [annotation(1, 1, CAT), annotation(2, 2, CAT, (1, 1, 9, 9))]
    )
    assert [i.id for i in split.images] == ([1, 2] if kept else [1])
    assert list(split.skips.by_reason.values()) == ([] if kept else [[2]])
    if not kept:
        assert any("32 px" in line and "skipped 1" in line for line in split.skips.lines())


def test_the_minimum_side_is_the_protocols(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1, 20, 20)], [annotation(1, 1, CAT, (1, 1, 9, 9))])
    small = Protocol("mine", PROTOCOL.base, PROTOCOL.novel, min_image_side_px=8)
    assert len(load_split(file, tmp_path, small, base_only=True).images) == 1


BAD_BOXES = [
    ((100, 10, 20, 20), "outside"),
    ((-30, 10, 20, 20), "outside"),
    ((10, 80, 5, 5), "outside"),
    ((10, -9, 5, 5), "outside"),
    ((10, 10, 0, 5), "no area"),
    ((10, 10, 5, 0), "no area"),
    ((10, 10, 0.0, 0.0), "no area"),
    ((float("nan"), 1, 2, 3), "not finite"),
    ((1, 1, float("inf"), 3), "not finite"),
    ((1, 1, 3, float("nan")), "not finite"),
    ((10, 10, -5, 5), "inverted"),
    ((10, 10, 5, -5), "inverted"),
    ((10, 10, -5, -5), "inverted"),
    ((1, 2, 3), "four numbers"),
    ((1, 2, 3, 4, 5), "four numbers"),
    ("1 2 3 4", "four numbers"),
    (None, "four numbers"),
    ((1, 2, "3", 4), "four numbers"),
    ((1, 2, None, 4), "four numbers"),
    ({"x": 1}, "four numbers"),
    ((1, 2, True, 4), "four numbers"),
    ((1, 2, [3], 4), "four numbers"),
    ((1, 2, 10**400, 4), "not finite"),
]


@pytest.mark.parametrize(("bbox", "reason"), BAD_BOXES)
@pytest.mark.parametrize("base_only", [True, False])
def test_a_bad_box_is_left_out_and_counted(tmp_path: Path, bbox: Any, reason: str, base_only: bool) -> None:
    split = load(
        tmp_path,
        [image(1), image(2)],
        [annotation(11, 1, CAT), annotation(12, 1, CAT, bbox), annotation(13, 2, CAT, bbox)],
        base_only=base_only,
    )
    assert [i.id for i in split.images] == [1]  # the other has no box left
    assert split.images[0].annotation_ids.tolist() == [11]
    (found, ids), (image_reason, image_ids) = split.skips.by_reason.items()
    assert reason in found
    assert (ids, image_reason, image_ids) == ([12, 13], "image, no annotation of it is left", [2])
    assert any("skipped 2" in line and reason in line and "12, 13" in line for line in split.skips.lines())


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((-5, -6, 15, 26), [0, 0, 10, 20]),
        ((90, 70, 50, 50), [90, 70, 100, 80]),
        ((-1, -1, 200, 200), [0, 0, 100, 80]),
        ((10.25, 20.5, 30.5, 40.25), [10.25, 20.5, 40.75, 60.75]),
    ],
)
def test_a_box_is_clipped_to_the_image(tmp_path: Path, bbox: Any, expected: list[float]) -> None:
    split = load(tmp_path, [image(1)], [annotation(1, 1, CAT, bbox)])
    assert split.images[0].boxes.tolist() == [expected]
    assert split.skips.by_reason == {}


def test_clip_box_says_why() -> None:
    assert clip_box([1, 2, 3, 4], 10, 10) == ([1.0, 2.0, 4.0, 6.0], "")
    box, why = clip_box([1, 2, 0, 4], 10, 10)
    assert box is None
    assert "area" in why


@pytest.mark.parametrize(
    "bbox", [(600.0, 10.0, 1e-6, 50.0), (10.0, 400.0, 50.0, 1e-6), (-1.0, 10.0, 1.0 + 1e-60, 20.0)]
)
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
    parts = {
        "images": [image(3), image(1)],
        "categories": CATEGORIES,
        "annotations": [
            annotation(1, 1, CAT),
            annotation(2, 3, ZEBRA, None),
            annotation(3, 3, DOG),
            annotation(4, 3, CAT, iscrowd=1),
            annotation(5, 1, ZEBRA, (1, 2, 3, 4)),
            annotation(6, 3, CAT, (5, 5, 200, 5)),
        ],
    }
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
    annotations = [
        annotation(
            int(k),
            int(rng.integers(40)),
            int(rng.choice([CAT, DOG, ZEBRA, IGNORED])),
            tuple(rng.uniform(-20, 90, 4).round(2).tolist()),
            iscrowd=int(rng.integers(5) == 0),
        )
        for k in rng.permutation(600)
    ]
    for base_only in (True, False):
        split = load(tmp_path, images, annotations, base_only=base_only)
        label_of = {ZEBRA: 0, CAT: 1} | ({} if base_only else {DOG: 2})
        wanted = {
            i["id"]: [
                (a["id"], label_of[a["category_id"]], clip_box(a["bbox"], 100, 80)[0])
                for a in annotations
                if a["image_id"] == i["id"]
                and a["category_id"] in label_of
                and not (base_only and a["iscrowd"])
                and clip_box(a["bbox"], 100, 80)[0] is not None
            ]
            for i in images
        }
        assert {
            i.id: list(zip(i.annotation_ids.tolist(), i.labels.tolist(), i.boxes.tolist(), strict=True))
            for i in split.images
        } == {key: rows for key, rows in wanted.items() if rows}
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


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {},
        {"images": [], "annotations": []},
        3,
        None,
        [{"images": [], "annotations": [], "categories": []}],
        {"images": [], "annotations": {"id": 1}, "categories": []},
        {"images": [], "annotations": [], "categories": [[]]},
        {"images": [3], "annotations": [], "categories": []},
        {"images": None, "annotations": [], "categories": []},
        {"images": [image(1)], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]},
    ],
)  # captions
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
    with pytest.raises(
        HdovdError, match="annotation 8 lacks"
    ):  # of what the file is comes before what the protocol asks
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
        load(
            tmp_path,
            [image(1)],
            [annotation(1, 1, CAT)],
            categories=[*CATEGORIES, {"id": 99, "name": CATEGORIES[0]["name"]}],
        )


def test_an_image_id_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json.*image id 1 .*twice"):
        load(tmp_path, [image(1), image(1)], [annotation(1, 1, CAT)])


def test_many_skips_are_shortened() -> None:
    skips = Skips()
    for item in range(20):
        skips.add("reason", item)
    (line,) = skips.lines()
    assert line.startswith("skipped 20: reason (0, 1, 2")
    assert "12 more" in line


# Values of other types than their keys have.

WRONG = [
    ("1", "the text '1'"),
    (True, "true"),
    (None, "null"),
    ([1], "a list"),
    ({"a": 1}, "an object"),
    (1.5, "1.5"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (1 << 63, "9223372036854775808"),
    (1e300, "a number of more than 64 bits"),
    (10**400, "a number of more than 64 bits"),
]


@pytest.mark.parametrize(("value", "found"), WRONG)
@pytest.mark.parametrize("key", ["id", "image_id", "category_id"])
def test_a_key_of_an_annotation_that_is_no_whole_number(tmp_path: Path, key: str, value: Any, found: str) -> None:
    with pytest.raises(HdovdError, match=rf"instances\.json: annotation .*: {key} is {found}, expected a whole number"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(2, 1, CAT) | {key: value}])


@pytest.mark.parametrize(("value", "found"), [*WRONG, (0, "0"), (-3, "-3")])
@pytest.mark.parametrize("key", ["width", "height"])
def test_a_side_of_an_image_that_is_none(tmp_path: Path, key: str, value: Any, found: str) -> None:
    with pytest.raises(
        HdovdError, match=rf"instances\.json: image 2: {key} is {found}, expected a whole number of 1 to"
    ):
        load(tmp_path, [image(1), image(2) | {key: value}], [annotation(1, 1, CAT)])


@pytest.mark.parametrize(("value", "found"), [*WRONG])
def test_an_id_of_an_image_or_category_that_is_no_whole_number(tmp_path: Path, value: Any, found: str) -> None:
    with pytest.raises(HdovdError, match=rf"instances\.json: image number 1: id is {found}"):
        load(tmp_path, [image(1), image(2) | {"id": value}], [annotation(1, 1, CAT)])
    with pytest.raises(HdovdError, match=rf"instances\.json: category number 4: id is {found}"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=[*CATEGORIES, {"id": value, "name": "last"}])


def test_whole_floats_are_whole_numbers_and_nulls_are_absent(tmp_path: Path) -> None:
    plain = load(tmp_path, [image(1), image(2)], [annotation(7, 2, CAT), annotation(8, 2, DOG)], base_only=False)
    split = load(
        tmp_path,
        [image(1) | {"id": 1.0}, image(2) | {"width": 100.0, "height": 80.0}],
        [
            annotation(7, 2, CAT, iscrowd=None, area=None, segmentation=None),
            annotation(8, 2, DOG) | {"image_id": 2.0, "category_id": 2.0},
        ],
        base_only=False,
        categories=[c | {"id": float(c["id"])} for c in CATEGORIES],
    )
    (expected,), (found,) = plain.images, split.images
    assert (found.id, found.width, found.height, found.labels.tolist(), found.annotation_ids.tolist()) == (
        expected.id,
        expected.width,
        expected.height,
        expected.labels.tolist(),
        expected.annotation_ids.tolist(),
    )
    assert all(type(value) is int for value in (found.id, found.width, found.height, *split.coco_ids))


@pytest.mark.parametrize("base_only", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iscrowd": "0"}, "iscrowd is the text '0', expected 0 or 1"),
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"iscrowd": [0]}, "iscrowd is a list"),
        ({"area": "9"}, "area is the text '9', expected a number"),
        ({"area": True}, "area is true"),
        ({"area": float("nan")}, "area is nan"),
        ({"area": 10**400}, "area is a number of more than 64 bits"),
    ],
)
def test_an_optional_key_of_another_type(tmp_path: Path, base_only: bool, change: dict[str, Any], message: str) -> None:
    with pytest.raises(HdovdError, match=rf"instances\.json: annotation 2: {message}"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(2, 1, CAT) | change], base_only=base_only)


def test_iscrowd_may_be_true_or_false(tmp_path: Path) -> None:
    split = load(tmp_path, [image(1)], [annotation(1, 1, CAT, iscrowd=True), annotation(2, 1, CAT, iscrowd=False)])
    assert split.images[0].annotation_ids.tolist() == [2]


# Categories.


def test_two_categories_of_one_id(tmp_path: Path) -> None:
    """Files merged by hand: one class would be taught as the other."""
    with pytest.raises(HdovdError, match=r"instances\.json: category id 7 is both 'cat' and 'horse'"):
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=[*CATEGORIES, {"id": 7, "name": "horse"}])


@pytest.mark.parametrize("base_only", [True, False])
def test_annotations_of_no_category_are_counted(tmp_path: Path, base_only: bool) -> None:
    split = load(
        tmp_path,
        [image(1), image(2), image(3)],
        [annotation(1, 1, CAT), annotation(2, 1, 55), annotation(3, 2, 55), annotation(4, 3, IGNORED)],
        base_only=base_only,
    )
    assert [i.id for i in split.images] == [1]
    assert split.skips.by_reason == {
        "annotation, its category is none of instances.json": [2, 3],
        "image, no annotation of it is left": [2],
    }
    assert split.empty == [3]


# Images without objects.


def test_images_without_objects_are_told_and_may_be_kept(tmp_path: Path) -> None:
    images = [image(1), image(2), image(3), image(4, 20, 20), image(5)]
    annotations = [annotation(1, 1, CAT), annotation(2, 2, DOG), annotation(3, 5, CAT, (1, 1, 0, 0))]
    file, said = write(tmp_path, images, annotations), list[str]()
    data = DataPaths(None, tmp_path, file)
    for base_only, left_out, line in (
        (True, [2, 3, 4], "3: image without an object of the base classes"),
        (False, [3, 4], "2: image without an object of the protocol's classes"),
    ):
        with lines_to(said.append):
            split = data.load("", PROTOCOL, base_only=base_only)
        assert split.empty == left_out
        assert any(line in one and "keep_empty" in one for one in said), said
        keeping = replace(PROTOCOL, **{"keep_empty_train" if base_only else "keep_empty_val": True})
        with lines_to(said.append):
            split = data.load("", keeping, base_only=base_only)
        # 4 is too small to train on, 5 not without objects
        assert [i.id for i in split.images] == ([1, 2, 3] if base_only else [1, 2, 3, 4])
        assert split.empty == []
        three = split.images[2]
        assert (three.boxes.shape, three.labels.shape, three.annotation_ids.shape) == ((0, 4), (0,), (0,))
        assert (three.boxes.dtype, three.labels.dtype, three.annotation_ids.dtype) == (np.float32, np.int64, np.int64)
    other = replace(PROTOCOL, keep_empty_train=True)
    with lines_to(said.append):
        assert data.load("", other, base_only=False).empty == [3, 4]  # each switch is for one


# Annotations that say it otherwise.


@pytest.mark.parametrize("bbox", [{}, {"bbox": None}])
@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([[10, 20, 40, 25, 30, 60.5]], [10, 20, 40, 60.5]),
        ([[10, 20, 12, 20, 12, 22], [50, 30, 60, 30, 60, 70.25]], [10, 20, 60, 70.25]),
        ({"size": [80, 100], "counts": [80 * 10 + 20, 40, 40, 40, 80 * 90 - 140]}, [10, 20, 12, 60]),
    ],
)
def test_the_box_follows_from_the_outline(tmp_path: Path, bbox: Any, segmentation: Any, expected: list[float]) -> None:
    bare = {k: v for k, v in annotation(1, 1, CAT, segmentation=segmentation).items() if k != "bbox"} | bbox
    assert load(tmp_path, [image(1)], [bare]).images[0].boxes.tolist() == [expected]


def test_the_box_of_a_compressed_mask(tmp_path: Path) -> None:
    from pycocotools import mask

    area = np.zeros((80, 100), np.uint8, order="F")
    area[20:60, 10:30] = 1
    counts = mask.encode(area)["counts"].decode()
    bare = annotation(1, 1, CAT, None, segmentation={"size": [80, 100], "counts": counts})
    assert load(tmp_path, [image(1)], [bare]).images[0].boxes.tolist() == [[10, 20, 30, 60]]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [["1", 2, 3, 4, 5, 6]],
        ["x"],
        "x",
        3,
        [[1, 2, 3, 4, 5, float("nan")]],
        {"a": 1},
        {"size": [0, 0], "counts": [1]},
        {"size": [80, 100], "counts": [3]},
        {"size": [80, 100], "counts": [-3, 8003]},
        {"size": [80, 100], "counts": "ooo"},
        {"size": [80, "100"], "counts": "0"},
        {"size": [80, 100], "counts": 3},
        {"size": [80, 100], "counts": "\u00e9"},
    ],
)
def test_an_outline_that_is_none(tmp_path: Path, segmentation: Any) -> None:
    split = load(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(2, 1, CAT, None, segmentation=segmentation)])
    assert split.skips.by_reason == {"annotation, box is not four numbers": [2]}


def test_a_packed_file_is_found_and_read(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    content = write(tmp_path, [image(1)], [annotation(1, 1, CAT)]).read_bytes()
    file = tmp_path / "annotations" / "instances_train2017.json.gz"
    file.write_bytes(gzip.compress(content))
    split = DataPaths(tmp_path).load("train2017", PROTOCOL, base_only=True)
    assert (split.annotations, len(split.images)) == (file, 1)
    (tmp_path / "val2017").mkdir()
    file.rename(tmp_path / "annotations" / "instances_val2017.json.gz")
    assert validation_of({"data": tmp_path, "val_images": None, "val_annotations": None, "form": "auto"}) is not None
    file.write_bytes(gzip.compress(content)[:-12])
    with pytest.raises(HdovdError, match=r"instances_train2017\.json\.gz is not valid JSON .*is the download complete"):
        DataPaths(tmp_path).load("train2017", PROTOCOL, base_only=True)


def test_coco_url_names_the_picture(tmp_path: Path) -> None:
    def entry(number: int, folder: str) -> dict[str, Any]:
        bare = {k: v for k, v in image(number).items() if k != "file_name"}
        return bare | {"coco_url": f"http://images.cocodataset.org/{folder}/{number:04d}.jpg"}

    images, annotations = [entry(1, "train2017"), entry(2, "val2017")], [annotation(1, 1, CAT), annotation(2, 2, CAT)]
    assert [i.file_name for i in load(tmp_path, images, annotations).images] == ["0001.jpg", "0002.jpg"]
    (tmp_path / "train2017").mkdir()
    (tmp_path / "val2017").mkdir()  # LVIS: the pictures of both lie side by side
    assert [i.file_name for i in load(tmp_path, images, annotations).images] == [
        "train2017/0001.jpg",
        "val2017/0002.jpg",
    ]


# Names.


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat\x1b[31m", r"'cat\\x1b\[31m'"),
        ("cat\n", r"'cat\\n'"),
        ("\u202ecat", r"'\\u202ecat'"),
        ("\ud800", r"'\\ud800'"),
        ("", "''"),
        ("c" * 201, "of 201 characters"),
        (3, "3"),
        (None, "null"),
        (["cat"], "a list"),
    ],
)
def test_category_names_that_cannot_be_printed(tmp_path: Path, name: Any, shown: str) -> None:
    with pytest.raises(HdovdError, match=rf"instances\.json: category 99: name is .*{shown}") as error:
        load(tmp_path, [image(1)], [annotation(1, 1, CAT)], categories=[*CATEGORIES, {"id": 99, "name": name}])
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["../0001.jpg", "a/../../0001.jpg", "/etc/passwd", "a/../..", "..", "/"])
def test_pictures_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        HdovdError, match=r"instances\.json: image 1: file_name is .* lies outside of the image folder .*--images"
    ):
        load(tmp_path, [image(1) | {"file_name": name}], [annotation(1, 1, CAT)])


def test_other_ways_to_name_a_picture_in_the_folder(tmp_path: Path) -> None:
    images = [
        image(k) | {"file_name": name}
        for k, name in enumerate((str(tmp_path / "a" / "1.jpg"), "a/../2..jpg", "b/3.jpg"), start=1)
    ]
    split = load(tmp_path, images, [annotation(k, k, CAT) for k in (1, 2, 3)])
    assert [i.file_name for i in split.images] == ["a/1.jpg", "2..jpg", "b/3.jpg"]


def test_names_from_the_annotations_on_lie_in_a_folder_that_is_named(tmp_path: Path) -> None:
    """As some tools write them; without --images they lie outside of the usual folder, and that is said."""
    (tmp_path / "notes" / "new").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    entries = [image(k) | {"file_name": name} for k, name in enumerate(("../../pictures/1.jpg", "a/../2.jpg"), start=1)]
    file = write(tmp_path, entries, [annotation(k, k, CAT) for k in (1, 2)]).rename(tmp_path / "notes/new/a.json")
    split = load_split(file, tmp_path / "pictures", PROTOCOL, base_only=True)
    assert [i.file_name for i in split.images] == ["1.jpg", "2.jpg"]
    with pytest.raises(HdovdError, match=r"image 1: file_name is .* lies outside of .*new: give .* with --images"):
        load_split(file, file.parent, PROTOCOL, base_only=True)


@pytest.mark.parametrize("name", [None, 3, "", "a\0.jpg", "a\n.jpg", ["a.jpg"], "x" * 5000])
def test_a_file_name_that_is_none(tmp_path: Path, name: Any) -> None:
    with pytest.raises(HdovdError, match=r"instances\.json: image 1"):
        load(tmp_path, [image(1) | {"file_name": name}], [annotation(1, 1, CAT)])


# Where a data set lies.


def test_the_layout_of_coco_2017(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    write(tmp_path, [image(1)], [annotation(1, 1, CAT), annotation(2, 1, CAT, (1, 1, 0, 0))]).rename(file)
    said: list[str] = []
    with lines_to(said.append):
        split = DataPaths(tmp_path).load("train2017", PROTOCOL, base_only=True)
    assert split.path(split.images[0]) == tmp_path / "train2017" / "0001.jpg"
    assert split.annotations == file
    assert len(said) == 1
    assert "skipped 1" in said[0]


def test_images_and_annotations_override_the_layout(tmp_path: Path) -> None:
    file = write(tmp_path, [image(1)], [annotation(1, 1, CAT)])
    split = DataPaths(None, tmp_path, file).load("train2017", PROTOCOL, base_only=True)
    assert (split.folder, split.annotations) == (tmp_path, file)


def test_paths_that_do_not_suffice(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="--data ROOT"):
        DataPaths(None, tmp_path, None).load("train2017", PROTOCOL, base_only=True)
    with pytest.raises(HdovdError, match="nowhere: no such folder"):
        DataPaths(tmp_path / "nowhere").load("train2017", PROTOCOL, base_only=True)
    with pytest.raises(HdovdError, match=r"of no known form.*instances_\*2017\.json"):
        DataPaths(tmp_path).load("val2017", PROTOCOL, base_only=False)
