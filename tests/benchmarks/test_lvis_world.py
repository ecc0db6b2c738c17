"""The world in LVIS's form: deterministic, laid out as LVIS is, its labels true where they say something, its tail
long, and its commands those of its page.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import lvis_world
import numpy as np
import pytest
from lvis_world import (
    LEFT_OUT,
    NOT_EXHAUSTIVE,
    RANK,
    TAIL_OFFSET,
    TRAIN_POWER,
    VAL_OFFSET,
    VAL_POWER,
    VERIFIED_ABSENT,
    draw_train,
    draw_val,
    federate,
    frequencies,
    make_world,
)
from other_world import NAMES
from PIL import Image

from hdovd.data import load_split, parse_protocol
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.demo.world import Scene

TRAIN, VAL, SEED = 10, 8, 3
IMAGE_KEYS = {"id", "width", "height", "coco_url", "neg_category_ids", "not_exhaustive_category_ids"}
CLASS_KEYS = {"id", "name", "synset", "synonyms", "def", "frequency", "image_count", "instance_count"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lvis")
    make_world(made, TRAIN, VAL, SEED, workers=1)
    return made


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Scene]]:
    return {
        "train": [draw_train(SEED, k) for k in range(TRAIN)],
        "val": [draw_val(SEED, VAL_OFFSET + k) for k in range(VAL)],
    }


@pytest.fixture(scope="module")
def objects() -> list[tuple[str, ...]]:
    """The classes of the objects of 400 pictures, without the pictures."""
    rng = np.random.default_rng(0)
    chance = (RANK + TAIL_OFFSET) ** TRAIN_POWER
    chosen = (rng.choice(NAMES, rng.integers(3, 11), p=chance / chance.sum()) for _ in range(400))
    return [tuple(map(str, names)) for names in chosen]


def _tree(root: Path, split: str) -> dict[str, Any]:
    return dict(json.loads((root / "annotations" / f"lvis_v1_{split}.json").read_text()))


def _hashes(root: Path) -> dict[str, str]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_same_seed_gives_the_same_bytes_and_another_others(root: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "same", TRAIN, VAL, SEED, workers=2)
    assert _hashes(tmp_path / "same") == _hashes(root)
    make_world(tmp_path / "other", 2, 1, SEED + 1, workers=1)
    other = _hashes(tmp_path / "other")
    assert all(other[name] != _hashes(root)[name] for name in other if name.endswith((".jpg", ".json")))


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_have_the_keys_of_lvis_and_pictures_lie_where_their_addresses_say(root: Path, split: str) -> None:
    tree = _tree(root, split)
    assert {"info", "licenses", "images", "annotations", "categories"} == tree.keys()
    assert {key for image in tree["images"] for key in image} == IMAGE_KEYS
    assert {key for entry in tree["categories"] for key in entry} == CLASS_KEYS
    boxes = tree["annotations"]
    assert all(box.keys() == {"id", "image_id", "category_id", "bbox", "area", "segmentation"} for box in boxes)
    assert len({box["id"] for box in boxes}) == len(boxes)
    for box in boxes:
        x, y, width, height = box["bbox"]
        assert box["area"] == width * height > 0
        assert box["segmentation"] == [[x, y, x + width, y, x + width, y + height, x, y + height]]
    for image in tree["images"]:
        start, _, place = image["coco_url"].partition(".invalid/")
        assert start == "http://images"
        with Image.open(root / place) as picture:
            assert picture.size == (image["width"], image["height"])


def test_some_validation_pictures_lie_among_the_training_pictures(root: Path) -> None:
    folders = {
        split: [i["coco_url"].split("/")[-2] for i in _tree(root, split)["images"]] for split in ("train", "val")
    }
    assert folders == {"train": ["train2017"] * TRAIN, "val": [*["val2017"] + ["train2017"] * 3] * 2}
    ids = [image["id"] for split in folders for image in _tree(root, split)["images"]]
    assert len(set(ids)) == TRAIN + VAL == len([*root.glob("*/*.jpg")])


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_a_file_says_is_true_of_what_was_drawn(root: Path, drawn: dict[str, list[Scene]], split: str) -> None:
    tree = _tree(root, split)
    names = {entry["id"]: entry["name"] for entry in tree["categories"]}
    assert tuple(names.values()) == NAMES
    for image, scene in zip(tree["images"], drawn[split], strict=True):
        boxes = [box for box in tree["annotations"] if box["image_id"] == image["id"]]
        told = [names[box["category_id"]] for box in boxes]
        there = {(name, *box) for name, box in zip(scene.names, scene.boxes.tolist(), strict=True)}
        for name, (x, y, width, height) in zip(told, (box["bbox"] for box in boxes), strict=True):
            assert (name, x, y, x + width, y + height) in there
        absent, partly = ({names[k] for k in image[f"{key}_category_ids"]} for key in ("neg", "not_exhaustive"))
        assert not absent & set(scene.names)
        assert partly <= set(told)
        for name in set(told):
            assert (told.count(name) < scene.names.count(name)) == (name in partly)


def test_letters_and_counts_are_of_all_that_was_drawn(root: Path, drawn: dict[str, list[Scene]]) -> None:
    assert _tree(root, "train")["categories"] == _tree(root, "val")["categories"]
    for entry in _tree(root, "train")["categories"]:
        counts = [scene.names.count(entry["name"]) for scene in drawn["train"]]
        assert (entry["image_count"], entry["instance_count"]) == (np.count_nonzero(counts), sum(counts))
        assert entry["frequency"] == ("r" if entry["image_count"] <= 1 else "c" if entry["image_count"] <= 3 else "f")


def test_limits_of_the_letters_grow_with_the_world() -> None:
    """In 1,000 pictures, class k of the first 60 is in k of them."""
    pictures = [tuple(name for k, name in enumerate(NAMES) if place < k) for place in range(1000)]
    letters = "".join(frequencies(pictures).values())
    assert letters == "r" * 6 + "c" * 35 + "f" * 19


def test_every_class_is_in_a_training_picture_and_validation_has_no_tail() -> None:
    assert [draw_train(SEED, k).names[0] for k in (0, 1, 59)] == [NAMES[k] for k in (0, 1, 59)]
    assert [draw_val(SEED, 60 + k).names[0] for k in (0, 59)] == [NAMES[k] for k in (0, 59)]
    weights = [(RANK + TAIL_OFFSET) ** power for power in (TRAIN_POWER, VAL_POWER)]
    assert 500 < weights[0].max() / weights[0].min() < 1000
    assert 2 < weights[1].max() / weights[1].min() < 2.6
    assert sorted(RANK) == list(range(1, 61))


def test_shares_of_labels_are_as_stated(objects: list[tuple[str, ...]]) -> None:
    labels = federate(objects, 1, 2)
    pairs = [(i, name) for i, names in enumerate(objects) for name in set(names)]
    left_out = {(i, name) for i, told in enumerate(labels) for name in told.left_out}
    assert abs(len(left_out) / len(pairs) - LEFT_OUT) < 0.02
    several = [(i, name) for i, name in pairs if objects[i].count(name) > 1 and (i, name) not in left_out]
    partly = {(i, name) for i, told in enumerate(labels) for name in told.not_exhaustive}
    assert partly <= set(several)
    assert abs(len(partly) / len(several) - NOT_EXHAUSTIVE) < 0.06
    for name in NAMES:
        assert sum(name in told.absent for told in labels) == VERIFIED_ABSENT * len(objects)


def test_labels_are_true_and_a_class_keeps_a_picture(objects: list[tuple[str, ...]]) -> None:
    labels = federate(objects, 1, 2)
    seen = set[str]()
    for names, told in zip(objects, labels, strict=True):
        boxes = [name for place, name in enumerate(names) if place not in told.hidden]
        seen.update(boxes)
        assert told.hidden <= set(range(len(names)))
        assert not set(told.absent) & set(names)
        assert set(told.left_out) == set(names) - set(boxes)
        assert set(told.not_exhaustive) == {name for name in set(boxes) if boxes.count(name) < names.count(name)}
    assert seen == {name for names in objects for name in names}
    assert federate(objects, 1, 2) == labels != federate(objects, 2, 2)


def test_the_protocol_has_frequent_and_common_classes_as_base_and_rare_ones_as_novel(root: Path) -> None:
    letters = {entry["name"]: entry["frequency"] for entry in _tree(root, "train")["categories"]}
    groups = {letter: [name for name in NAMES if letters[name] == letter] for letter in "rcf"}
    assert all(groups.values())
    assert tomllib.loads((root / "protocol.toml").read_text()) == {
        "name": "lvis-world",
        "base": groups["f"] + groups["c"],
        "novel": groups["r"],
        "max_detections": [300],
        "keep_empty_val": True,
        "federated": True,
        "metric": "ap",
        "groups": groups,
    }
    vocabulary = read_vocabulary(root / "vocabulary.txt")
    assert set(NAMES) < set(vocabulary)
    assert len(vocabulary) > 1000


def test_hdovd_reads_both_files(root: Path) -> None:
    tree = tomllib.loads((root / "protocol.toml").read_text())
    protocol = parse_protocol({key: tree[key] for key in ("name", "base", "novel", "max_detections", "keep_empty_val")})
    for split in ("train", "val"):
        file = root / "annotations" / f"lvis_v1_{split}.json"
        found = load_split(file, root, protocol, base_only=False)
        assert sum(len(image.labels) for image in found.images) == len(_tree(root, split)["annotations"])
        assert all(found.path(image).is_file() for image in found.images)


def test_the_page_has_the_commands_that_are_printed() -> None:
    page = " ".join((lvis_world.__doc__ or "").replace("\\\n", " ").split())
    commands = lvis_world.next_commands(Path("OUT"), "local-dir:OUT/teacher")
    assert len(commands) == 4
    assert all(command in page for command in commands)
