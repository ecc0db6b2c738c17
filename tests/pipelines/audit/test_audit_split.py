"""The leak report of the training set: novel boxes among the base rows and test pictures are found, honest sets are not
accused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from audit_scenes import TRAIN, VAL, check_of, edit, leak_of, report_of

from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip

Extract = Callable[..., ExtractConfig]


# --- base rows ---


def _novel(world: Path) -> tuple[dict[str, Any], dict[int, str]]:
    """A novel annotation of an image that is trained on, and the names of all categories."""
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    with_base = {a["image_id"] for a in tree["annotations"] if names[a["category_id"]] in BASE}
    return next(
        a for a in tree["annotations"] if names[a["category_id"]] not in BASE and a["image_id"] in with_base
    ), names


def test_a_novel_annotation_that_was_relabelled_for_training(
    world: Path, copied_world: Path, extraction: Extract, tmp_path: Path
) -> None:
    """The cache was made from a file that calls a novel object base; the raw file says what it is."""
    wanted, names = _novel(world)

    def relabel(tree: dict[str, Any]) -> None:
        own = next(a for a in tree["annotations"] if a["id"] == wanted["id"])
        own["category_id"] = next(i for i, name in names.items() if name == BASE[0])

    edit(copied_world / "annotations" / "instances_train2017.json", relabel)
    extract_clip(extraction(tmp_path / "c", data=copied_world))
    text = leak_of(report_of(world, tmp_path / "c"), "base boxes")
    assert f"annotation {wanted['id']} of image {wanted['image_id']}" in text
    assert f"{names[wanted['category_id']]!r}, which is novel" in text


def test_a_novel_box_under_a_base_annotations_id(
    world: Path, copied_world: Path, extraction: Extract, tmp_path: Path
) -> None:
    wanted, names = _novel(world)
    changed = []

    def move(tree: dict[str, Any]) -> None:
        own = next(
            a for a in tree["annotations"] if a["image_id"] == wanted["image_id"] and names[a["category_id"]] in BASE
        )
        own["bbox"] = wanted["bbox"]
        changed.append(own["id"])

    edit(copied_world / "annotations" / "instances_train2017.json", move)
    extract_clip(extraction(tmp_path / "c", data=copied_world))
    text = leak_of(report_of(world, tmp_path / "c"), "base boxes")
    assert (
        f"that of annotation {changed[0]}, image {wanted['image_id']}, has the box of annotation {wanted['id']}" in text
    )
    assert f"{names[wanted['category_id']]!r}, which is novel" in text


def test_a_novel_box_under_an_id_that_is_in_no_file(
    world: Path, copied_world: Path, extraction: Extract, tmp_path: Path
) -> None:
    wanted, names = _novel(world)

    def add(tree: dict[str, Any]) -> None:
        category = next(i for i, name in names.items() if name == BASE[0])
        tree["annotations"].append(wanted | {"id": 987_654, "category_id": category})

    edit(copied_world / "annotations" / TRAIN, add)
    extract_clip(extraction(tmp_path / "c", data=copied_world))
    report = report_of(world, tmp_path / "c")
    expected = f"that of annotation 987654, image {wanted['image_id']}, has the box of annotation {wanted['id']}"
    assert expected in leak_of(report, "base boxes")
    assert check_of(report, "base boxes").numbers["unknown_ids"] == 1


def test_ids_that_were_dealt_anew_are_no_leak(copied_world: Path, cache: Path) -> None:
    """Base rows whose ids now are those of novel annotations elsewhere: the file is another, and nothing was
    learned."""

    def reverse(tree: dict[str, Any]) -> None:
        ids = [own["id"] for own in tree["annotations"]]
        for own, other in zip(tree["annotations"], reversed(ids), strict=True):
            own["id"] = other

    edit(copied_world / "annotations" / TRAIN, reverse)
    check = check_of(report_of(copied_world, cache), "base boxes")
    assert check.verdict is Verdict.UNKNOWN
    assert "lie elsewhere than their annotation" in check.text
    assert check.numbers["not_base"] == check.numbers["copied"] == 0


def test_a_base_object_that_shares_a_novel_object_s_box(copied_world: Path, cache: Path) -> None:
    """In a renumbered file with a novel annotation on a base box: the row is the base annotation."""

    def double(tree: dict[str, Any]) -> None:
        names = {c["id"]: c["name"] for c in tree["categories"]}
        novel = next(i for i, name in names.items() if name not in BASE)
        for own in tree["annotations"]:
            own["id"] += 10_000
        own = next(a for a in tree["annotations"] if names[a["category_id"]] in BASE)
        tree["annotations"].append(own | {"id": 99_999, "category_id": novel})

    edit(copied_world / "annotations" / TRAIN, double)
    assert check_of(report_of(copied_world, cache), "base boxes").verdict is Verdict.UNKNOWN


def test_all_novel_boxes_under_new_ids_are_counted(
    copied_world: Path, world: Path, extraction: Extract, tmp_path: Path
) -> None:
    """Many rows in many images, each beside its own annotation."""

    def rename(tree: dict[str, Any]) -> None:
        base = next(c["id"] for c in tree["categories"] if c["name"] == BASE[0])
        for own in tree["annotations"]:
            own.update(category_id=base, id=own["id"] + 10_000)

    edit(copied_world / "annotations" / TRAIN, rename)
    extract_clip(extraction(tmp_path / "c", data=copied_world))
    tree = json.loads((world / "annotations" / TRAIN).read_text())
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    novel = [a for a in tree["annotations"] if a["category_id"] not in base]
    check = check_of(report_of(world, tmp_path / "c"), "base boxes")
    assert check.numbers["copied"] == len(novel) > 10
    assert check.numbers["unknown_ids"] == check.numbers["base_rows"] == len(tree["annotations"])


def test_other_data_is_unknown_and_not_fine(copied_world: Path, cache: Path) -> None:
    def renumber(tree: dict[str, Any]) -> None:
        for annotation in tree["annotations"]:
            annotation["id"] += 10_000

    edit(copied_world / "annotations" / "instances_train2017.json", renumber)
    check = check_of(report_of(copied_world, cache), "base boxes")
    assert check.verdict is Verdict.UNKNOWN
    assert "give the annotation file that the cache was made from" in check.text


# --- pictures ---


def test_a_validation_image_in_the_training_set(copied_world: Path, cache: Path) -> None:
    train = json.loads((copied_world / "annotations" / "instances_train2017.json").read_text())["images"]
    edit(copied_world / "annotations" / "instances_val2017.json", lambda tree: tree["images"].append(train[0]))
    assert f"image {train[0]['id']} is in the training set and in" in leak_of(
        report_of(copied_world, cache), "train and val"
    )


def test_a_copy_of_a_validation_picture_under_another_id(copied_world: Path, cache: Path) -> None:
    train = json.loads((copied_world / "annotations" / "instances_train2017.json").read_text())["images"][0]
    val = json.loads((copied_world / "annotations" / "instances_val2017.json").read_text())["images"][0]
    shutil.copy(copied_world / "val2017" / val["file_name"], copied_world / "train2017" / train["file_name"])
    text = leak_of(report_of(copied_world, cache), "train and val")
    assert f"training image {train['id']} " in text
    assert val["file_name"] in text


def change_first(tree: Any, values: dict[str, Any]) -> None:
    """Another entry for the first image, whose annotations go with it."""
    image = tree["images"][0]
    for a in tree["annotations"]:
        if a["image_id"] == image["id"]:
            a["image_id"] = values["id"]
    image.update(values)


def test_ids_that_both_sides_count_from_one_are_no_leak(copied_world: Path, cache: Path) -> None:
    train = json.loads((copied_world / "annotations" / "instances_train2017.json").read_text())["images"][0]
    edit(copied_world / "annotations" / "instances_val2017.json", lambda tree: change_first(tree, {"id": train["id"]}))
    check = check_of(report_of(copied_world, cache), "train and val")
    assert check.verdict is Verdict.OK
    assert any(f"image id {train['id']} is used" in detail for detail in check.details)


def test_shared_ids_without_the_pictures(copied_world: Path, cache: Path) -> None:
    """Both sets count from one, and their pictures are not here: the id alone shows nothing, name and size do."""
    train = json.loads((copied_world / "annotations" / TRAIN).read_text())["images"][0]
    shutil.rmtree(copied_world / "val2017")
    edit(copied_world / "annotations" / VAL, lambda tree: change_first(tree, {"id": train["id"]}))
    check = check_of(report_of(copied_world, cache), "train and val")
    assert check.verdict is Verdict.UNKNOWN
    assert any(f"on both sides (ids {train['id']})" in line for line in check.details)
    edit(copied_world / "annotations" / VAL, lambda tree: change_first(tree, train | {"width": train["width"] + 1}))
    assert check_of(report_of(copied_world, cache), "train and val").verdict is Verdict.UNKNOWN
    edit(copied_world / "annotations" / VAL, lambda tree: change_first(tree, train))
    assert f"image {train['id']} is in the training set and in" in leak_of(
        report_of(copied_world, cache), "train and val"
    )


def test_a_cache_of_validation_pictures(copied_world: Path, cache: Path) -> None:
    """The cache was made from what --data calls validation: its images are not in the training file, but its boxes are
    there.
    """
    folder = copied_world / "annotations"
    first, second = ((folder / file).read_text() for file in (TRAIN, VAL))
    (folder / TRAIN).write_text(second)
    (folder / VAL).write_text(first)
    report = report_of(copied_world, cache)
    assert "is in the training set and in" in leak_of(report, "train and val")
    edit(folder / VAL, lambda tree: [own.update(bbox=[0, 0, 5, 5]) for own in tree["annotations"]])
    assert check_of(report_of(copied_world, cache), "train and val").verdict is Verdict.UNKNOWN


def test_pictures_that_are_elsewhere_are_not_passed(copied_world: Path, cache: Path) -> None:
    shutil.rmtree(copied_world / "val2017")
    check = check_of(report_of(copied_world, cache), "train and val")
    assert (check.verdict, check.numbers["absent"]) == (Verdict.UNKNOWN, 8)
    (copied_world / "annotations" / "instances_val2017.json").unlink()
    assert check_of(report_of(copied_world, cache), "train and val").verdict is Verdict.UNKNOWN
