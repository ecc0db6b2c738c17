"""The second drawn world: deterministic, as COCO has it, its names in the shipped vocabulary, and a teacher that hdovd
takes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import other_world
import pytest
from other_world import BASE, LIKED, LOOKS, NAMES, NOVEL, draw_scene, make_teacher, make_world, named_rightly

from hdovd.data import load_protocol, load_split
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.demo.world import SHAPES, Scene


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("other")
    make_world(made, 6, 3, seed=3, workers=1)
    return made


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [draw_scene(11, index) for index in range(60)]


def _hashes(root: Path) -> dict[str, str]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_names_are_those_of_the_shipped_vocabulary_and_none_of_the_demo() -> None:
    assert (len(BASE), len(NOVEL), len(set(NAMES))) == (45, 15, 60)
    assert set(NAMES) <= set(shipped("general"))
    assert not set(NAMES) & set(SHAPES)


def test_classes_share_outlines_and_patterns_but_none_both() -> None:
    outlines = [look.radius.tobytes() for look in LOOKS.values()]
    patterns = [look.pattern.tobytes() for look in LOOKS.values()]
    assert len(set(outlines)) == other_world.OUTLINES
    assert len(set(patterns)) == other_world.PATTERNS
    assert len(set(zip(outlines, patterns, strict=True))) == len(NAMES)


def test_same_seed_gives_the_same_bytes_whatever_the_workers(root: Path, tmp_path: Path) -> None:
    make_world(tmp_path, 6, 3, seed=3, workers=2)
    assert _hashes(tmp_path) == _hashes(root)


def test_more_pictures_only_add_and_another_seed_gives_others(root: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "fewer", 2, 1, seed=3, workers=1)
    make_world(tmp_path / "other", 2, 1, seed=4, workers=1)
    for name in ("train2017/000000000002.jpg", "val2017/000000500001.jpg"):
        assert (tmp_path / "fewer" / name).read_bytes() == (root / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (root / name).read_bytes()


def test_it_is_a_coco_folder_without_captions(root: Path) -> None:
    protocol = load_protocol(str(root / "protocol.toml"))
    assert protocol.names == BASE + NOVEL
    assert sorted(file.name for file in (root / "annotations").iterdir()) == [
        "instances_train2017.json",
        "instances_val2017.json",
    ]
    for split, count in (("train2017", 6), ("val2017", 3)):
        file = root / "annotations" / f"instances_{split}.json"
        found = load_split(file, root / split, protocol, base_only=False)
        assert len(found.images) == count
        assert sum(len(image.labels) for image in found.images) == len(json.loads(file.read_text())["annotations"])


def test_objects_are_many_small_inside_and_never_hidden(many: list[Scene]) -> None:
    for scene in many:
        assert 3 <= len(scene.boxes) <= 10
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, 2:] <= scene.image.size).all()
        for k, box in enumerate(scene.boxes.tolist()):
            assert all(other_world.covered(box, other) <= 0.33 for other in scene.boxes.tolist()[:k])
    longer = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(1) for scene in many])
    assert longer.min() >= 14
    assert longer.max() <= 60
    assert np.mean(longer < 32) > 0.5


def test_frequencies_have_a_long_tail_and_objects_follow_the_room(many: list[Scene]) -> None:
    assert 5 < other_world.FREQUENCY.max() / other_world.FREQUENCY.min() < 7
    assert (np.bincount(LIKED.ravel()) == 2).all()
    liked = [NAMES.index(n) in LIKED[other_world.ROOMS.index(scene.ground)] for scene in many for n in scene.names]
    assert np.mean(liked) > 0.5  # a third, if it did not matter


def test_objects_differ_and_stand_out_from_the_ground(many: list[Scene]) -> None:
    """Pixels of a box vary more than those of its picture."""
    spreads = [
        (np.asarray(scene.image.crop(tuple(box)), float).std(), np.asarray(scene.image, float).std())
        for scene in many
        for box in scene.boxes
    ]
    assert np.mean([inside > 0.8 * whole for inside, whole in spreads]) > 0.8


def test_the_teacher_is_one_that_hdovd_takes(tmp_path: Path) -> None:
    clip = make_teacher(tmp_path / "teacher", 0, scene_count=8, steps=2, workers=1)
    shares = named_rightly(clip, 0, scene_count=4, workers=1)
    assert next(iter(shares)) == "of all 60"
    assert all(0 <= share <= 1 for share in shares.values())
    assert str(tmp_path / "teacher") in "\n".join(other_world.next_commands(tmp_path, clip))
