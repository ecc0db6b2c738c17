"""The demo world: the same bytes for a seed, and what a small OV-COCO must hold."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.data import load_protocol
from hdovd.pipelines.demo.world import ABSENT, BASE, GROUNDS, NOVEL, SHAPES, make_world, scenes


def _hash(root: Path) -> dict[str, str]:
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(root.rglob("*"))
        if f.is_file()
    }


def _tree(world: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((world / "annotations" / f"{name}.json").read_text()))


def test_same_seed_gives_the_same_bytes_whatever_the_workers(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "two", train_images=24, val_images=8, seed=3, workers=2)
    assert _hash(tmp_path / "two") == _hash(world)


def test_another_seed_gives_another_world_and_more_pictures_only_add(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "other", train_images=3, val_images=1, seed=4, workers=1)
    make_world(tmp_path / "fewer", train_images=3, val_images=1, seed=3, workers=1)
    for name in ("train2017/000000000002.jpg", "val2017/000000500001.jpg"):
        assert (tmp_path / "fewer" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_classes_are_many_and_a_third_is_novel(world: Path) -> None:
    protocol = load_protocol(str(world / "protocol.toml"))
    assert protocol.names == BASE + NOVEL
    assert len(protocol.names) >= 24
    assert 0.25 <= len(NOVEL) / len(protocol.names) <= 0.4
    assert {c["name"] for c in _tree(world, "instances_train2017")["categories"]} == set(protocol.names)


def test_novel_names_do_not_follow_from_the_parts_of_other_names() -> None:
    words = [set(re.findall("[a-z]+", name)) for name in SHAPES]
    assert sum(map(len, words)) == len(set().union(*words))


def test_novel_objects_are_in_pictures_and_annotations_of_both_splits(world: Path) -> None:
    for split in ("train2017", "val2017"):
        tree = _tree(world, f"instances_{split}")
        novel = {c["id"] for c in tree["categories"] if c["name"] in NOVEL}
        count = sum(a["category_id"] in novel for a in tree["annotations"])
        assert 0.15 * len(tree["annotations"]) < count < 0.5 * len(tree["annotations"])


def test_annotations_fit_the_pictures(world: Path) -> None:
    for split in ("train2017", "val2017"):
        tree = _tree(world, f"instances_{split}")
        assert len({i["id"] for i in tree["images"]}) == len(tree["images"])
        assert [a["id"] for a in tree["annotations"]] == list(
            range(1, len(tree["annotations"]) + 1)
        )  # pycocotools: none is 0
        images = {i["id"]: i for i in tree["images"]}
        for image in images.values():
            with Image.open(world / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert min(picture.size) >= 32
        for a in tree["annotations"]:
            x, y, w, h = a["bbox"]
            assert x >= 0
            assert y >= 0
            assert min(w, h) >= 5
            assert x + w <= images[a["image_id"]]["width"]
            assert y + h <= images[a["image_id"]]["height"]
            assert a["area"] == w * h
    train, val = ({i["id"] for i in _tree(world, f"instances_{s}")["images"]} for s in ("train2017", "val2017"))
    assert not train & val


def test_pictures_hold_two_to_six_objects(world: Path) -> None:
    tree = _tree(world, "instances_train2017")
    counts = [sum(a["image_id"] == i["id"] for a in tree["annotations"]) for i in tree["images"]]
    assert max(counts) <= 6
    assert sum(2 <= c <= 6 for c in counts) >= 0.9 * len(counts)
    assert len(set(counts)) >= 3


@pytest.fixture(scope="module")
def many() -> list[Any]:
    """Sixty scenes of another seed, without files."""
    return scenes(60, seed=11, offset=0, workers=1)


def test_captions_name_objects_and_sometimes_what_is_not_there(many: list[Any]) -> None:
    absent = named = novel = left_out = 0
    for scene in many:
        words = set(re.findall("[a-z]+", scene.caption.lower()))
        told = words & {*SHAPES, *ABSENT}
        absent += bool(told - set(scene.names))
        left_out += bool(set(scene.names) - words)
        named += len(told & set(scene.names))
        novel += bool(told & set(scene.names) & set(NOVEL))
        assert scene.ground in words
    assert 0.03 * len(many) < absent < 0.4 * len(many)
    assert left_out > 0.1 * len(many)
    assert named > 2 * len(many)
    assert novel > 0.3 * len(many)


def test_every_class_and_ground_appears(many: list[Any]) -> None:
    assert {name for scene in many for name in scene.names} == set(SHAPES)
    assert {scene.ground for scene in many} == set(GROUNDS)


def test_vocabulary_holds_all_names_and_words_that_no_picture_shows(world: Path) -> None:
    vocabulary = (world / "vocabulary.txt").read_text().split()
    assert set(SHAPES) | set(ABSENT) | set(GROUNDS) == set(vocabulary)
    assert len(vocabulary) == len(set(vocabulary))
    assert not set(ABSENT) & set(SHAPES)


def test_objects_of_one_class_differ_and_stand_out_from_the_ground(many: list[Any]) -> None:
    crops = [
        np.asarray(scene.image.resize((24, 24), box=tuple(box)), np.float32)
        for scene in many
        for box, name in zip(scene.boxes, scene.names, strict=True)
        if name == "star"
    ]
    assert len(crops) >= 3
    assert all(np.abs(a - b).mean() > 10 for k, a in enumerate(crops) for b in crops[:k])
    assert np.mean([crop.std() for crop in crops]) > 20
