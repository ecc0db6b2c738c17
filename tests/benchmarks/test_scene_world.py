"""The world of scenes: deterministic, as COCO has it, each ground with classes of its own, and a teacher that hdovd
takes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import scene_world
import torch
from scene_world import OWN, captioned_wholes, draw_scene, make_teacher

from hdovd.data import load_protocol, load_split
from hdovd.pipelines.demo.world import BASE, GROUNDS, NOVEL, SHAPES, Scene, draw_scene as draw_demo_scene, make_world
from hdovd.pipelines.teachers.openclip import load_clip


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [draw_scene(11, index) for index in range(60)]


def _world(root: Path, seed: int, workers: int) -> dict[str, str]:
    counts = {"train_images": 4, "val_images": 2}
    make_world(root, **counts, seed=seed, workers=workers, draw=draw_scene, name="scene-world")
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_class_belongs_to_one_ground_and_every_ground_has_base_and_novel_classes() -> None:
    assert tuple(OWN) == GROUNDS
    assert sorted(name for own in OWN.values() for name in own) == sorted(SHAPES)
    for own in OWN.values():
        assert len(own) == 4
        assert set(own) & set(NOVEL)
        assert set(own) & set(BASE)


def test_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one = _world(tmp_path / "one", 3, workers=1)
    assert one == _world(tmp_path / "two", 3, workers=2)
    other = _world(tmp_path / "other", 4, workers=1)
    assert all(one[name] != other[name] for name in one if name.endswith(".jpg"))


def test_it_is_a_coco_folder_with_captions_and_its_own_protocol(tmp_path: Path) -> None:
    _world(tmp_path, 3, workers=1)
    protocol = load_protocol(str(tmp_path / "protocol.toml"))
    assert (protocol.name, protocol.names) == ("scene-world", BASE + NOVEL)
    file = tmp_path / "annotations" / "instances_train2017.json"
    found = load_split(file, tmp_path / "train2017", protocol, base_only=False)
    assert [tuple(protocol.names[k] for k in image.labels) for image in found.images] == [
        draw_scene(3, index).names for index in range(4)
    ]
    captions = json.loads((tmp_path / "annotations" / "captions_train2017.json").read_text())["annotations"]
    assert [entry["caption"] for entry in captions] == [draw_scene(3, index).caption for index in range(4)]


def test_objects_follow_the_ground_as_often_as_they_should(many: list[Scene]) -> None:
    own = [name in OWN[scene.ground] for scene in many for name in scene.names]
    expected = scene_world.OWN_SHARE + (1 - scene_world.OWN_SHARE) / len(GROUNDS)
    assert abs(np.mean(own) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(own))
    assert not all(own)


def test_objects_of_the_demo_do_not_follow_the_ground() -> None:
    pictures = [draw_demo_scene(11, index) for index in range(60)]
    own = [name in OWN[scene.ground] for scene in pictures for name in scene.names]
    assert np.mean(own) < 0.35  # a sixth by chance


def test_captions_of_whole_pictures_name_what_is_there(many: list[Scene]) -> None:
    side = scene_world.MODEL_CFG["vision_cfg"]["image_size"]
    pixels, captions = captioned_wholes(many, 0, side)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (60, 3, side, side))
    told = [scene.caption == caption for scene, caption in zip(many, captions, strict=True)]
    assert 0.25 < np.mean(told) < 0.75
    for scene, caption, whole in zip(many, captions, told, strict=True):
        assert whole or any(name in caption for name in scene.names)
    with_ground = [scene.ground in caption for scene, caption in zip(many, captions, strict=True)]
    assert all(told_ground for told_ground, whole in zip(with_ground, told, strict=True) if whole)
    assert not all(with_ground)


def test_the_teacher_is_one_that_hdovd_takes(tmp_path: Path) -> None:
    clip = make_teacher(tmp_path / "teacher", 0, whole_count=8, crop_count=4, steps=2, workers=1)
    rows = load_clip(clip, None, device="cpu").embed_names(list(SHAPES), ["a photo of a {}"])
    assert rows.shape == (len(SHAPES), scene_world.MODEL_CFG["embed_dim"])
    assert clip in "\n".join(scene_world.next_commands(tmp_path, clip))
