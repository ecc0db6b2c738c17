"""Each level's key changes with its own inputs and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hdovd.cache.identity import key_of
from hdovd.cache.schema import Level
from hdovd.coco import ImageBoxes
from hdovd.pipelines.identities import data_inputs, level_inputs
from hdovd.pipelines.nouns import Nouns
from hdovd.pipelines.proposal_file import Proposals

ALL = set(Level)
INSTANCE, IMAGE, CLASS, NOUN = Level.INSTANCE, Level.IMAGE, Level.CLASS, Level.NOUN


def _image(image_id: int, count: int, **changes: Any) -> ImageBoxes:
    boxes = (np.arange(count * 4).reshape(-1, 4) + np.array([0, 0, 10, 10])).astype(np.float32)
    values = {"id": image_id, "file_name": f"{image_id}.jpg", "width": 64, "height": 48, "boxes": boxes,
              "labels": np.zeros(count, np.int64), "annotation_ids": np.arange(count) + 100 * image_id}
    return ImageBoxes(**(values | changes))


def _inputs() -> dict[str, Any]:
    images = [_image(1, 2), _image(2, 1), _image(5, 3)]
    proposals = {1: Proposals(np.array([[1, 2, 30, 40]], np.float32), np.array([0.5], np.float32)),
                 5: Proposals(np.array([[1, 2, 30, 40], [3, 4, 20, 20]], np.float32), np.array([0.5, 0.25], np.float32))}
    return {"clip": {"weights_sha256": "w", "activation": "gelu"}, "images": images, "proposals": proposals,
            "nouns": Nouns(("dog", "cat", "sky"), {1: (0, 2), 5: (1,)}), "class_names": ["a", "b"], "templates": ["a {}", "the {}"]}


def _keys(values: dict[str, Any]) -> dict[Level, str]:
    return {level: key_of(inputs) for level, inputs in level_inputs(**values).items()}


def _with_image(number: int, change: Callable[[ImageBoxes], ImageBoxes]) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        values["images"][number] = change(values["images"][number])

    return apply


def _moved_box(values: dict[str, Any]) -> None:
    """The last box of image 1 becomes the first of image 2: the same boxes in the same order."""
    one, two = values["images"][:2]
    boxes = np.concatenate([one.boxes[1:], two.boxes])
    ids = np.concatenate([one.annotation_ids[1:], two.annotation_ids])
    values["images"][:2] = [replace(one, boxes=one.boxes[:1], annotation_ids=one.annotation_ids[:1]),
                            replace(two, boxes=boxes, annotation_ids=ids)]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], set[Level]]] = {
    "nothing": (lambda v: None, set()),
    "weights": (lambda v: v["clip"].update(weights_sha256="x"), ALL),
    "activation": (lambda v: v["clip"].update(activation="quickgelu"), ALL),
    "template": (lambda v: v.update(templates=["a {}", "this {}"]), {INSTANCE, CLASS, NOUN}),
    "template order": (lambda v: v["templates"].reverse(), {INSTANCE, CLASS, NOUN}),
    "class name": (lambda v: v.update(class_names=["a", "c"]), {CLASS}),
    "class order": (lambda v: v["class_names"].reverse(), {CLASS}),
    "vocabulary word": (lambda v: v.update(nouns=replace(v["nouns"], vocabulary=("dog", "cat", "sea"))), {INSTANCE, NOUN}),
    "words of an image": (lambda v: v["nouns"].by_image.update({1: (0,)}), {INSTANCE}),
    "words moved to another image": (lambda v: v.update(nouns=replace(v["nouns"], by_image={2: (0, 2), 5: (1,)})), {INSTANCE}),
    "no captions": (lambda v: v.update(nouns=replace(v["nouns"], by_image=None)), {INSTANCE}),
    "words of an unknown image": (lambda v: v["nouns"].by_image.update({77: (0,)}), set()),
    "no nouns": (lambda v: v.update(nouns=None), {INSTANCE, NOUN}),
    "proposal box": (lambda v: v["proposals"][1].boxes.__setitem__((0, 0), 1.5), {INSTANCE}),
    "proposal score": (lambda v: v["proposals"][1].scores.__setitem__(0, 0.75), {INSTANCE}),
    "proposal of another image": (lambda v: v["proposals"].update({2: v["proposals"].pop(1)}), {INSTANCE}),
    "proposal of an unknown image": (lambda v: v["proposals"].update({77: v["proposals"][1]}), set()),
    "no proposals": (lambda v: v["proposals"].clear(), {INSTANCE}),
    "file name": (_with_image(1, lambda i: replace(i, file_name="other.jpg")), {INSTANCE, IMAGE}),
    "image id": (_with_image(1, lambda i: replace(i, id=3)), {INSTANCE, IMAGE}),
    "image size": (_with_image(1, lambda i: replace(i, width=65)), {INSTANCE, IMAGE}),
    "image order": (lambda v: v["images"].reverse(), {INSTANCE, IMAGE}),
    "image left out": (lambda v: v["images"].pop(), {INSTANCE, IMAGE}),
    "base box": (_with_image(0, lambda i: replace(i, boxes=i.boxes + np.float32(1e-3))), {INSTANCE}),
    "annotation id": (_with_image(0, lambda i: replace(i, annotation_ids=i.annotation_ids + 1)), {INSTANCE}),
    "box order": (_with_image(0, lambda i: replace(i, boxes=i.boxes[::-1], annotation_ids=i.annotation_ids[::-1])), {INSTANCE}),
    "box moved to the next image": (_moved_box, {INSTANCE}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_key_changes_with_its_inputs_alone(name: str) -> None:
    change, expected = CHANGES[name]
    before = _keys(_inputs())
    values = _inputs()
    change(values)
    after = _keys(values)
    assert {level for level in ALL if before.get(level) != after.get(level)} == expected


def test_training_asks_for_a_part_of_what_extraction_wrote() -> None:
    written, asked = level_inputs(**_inputs()), data_inputs(_inputs()["images"])
    assert asked.keys() == {INSTANCE, IMAGE}
    for level, inputs in asked.items():
        assert inputs == {name: written[level][name] for name in inputs}
        assert inputs
