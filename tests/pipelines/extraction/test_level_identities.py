"""Each level's key changes with its own inputs and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hdovd.pipelines.extraction.identities
from hdovd.cache import KeyInputs, Level, key_of
from hdovd.cache.identity import hash_texts
from hdovd.data import ImageBoxes
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, Shape
from hdovd.pipelines.embedding.embedders import Pictures, embedders_of
from hdovd.pipelines.extraction.identities import TextRows, box_table, data_inputs, level_inputs
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.proposal_files.file import Proposals
from hdovd.pipelines.teachers.base import Name, prompts

ALL = set(Level)
BOXES, INSTANCE, IMAGE, CLASS, NOUN, PSEUDO_LABEL = Level
EMBEDDED = ALL - {BOXES}
TEXTS = {CLASS, NOUN, PSEUDO_LABEL}  # a pseudo label is a row of the noun level
CROPS = {BOXES, INSTANCE, PSEUDO_LABEL}
PICTURES = CROPS | {IMAGE}


@dataclass
class _Teacher:
    """What identities ask of a model; `lower_case` stands for a tokenizer of another kind."""

    identity: dict[str, Any] = field(
        default_factory=lambda: {"weights_sha256": "w", "activation": "gelu", "compute_dtype": "float32"}
    )
    preprocessing: dict[str, Any] = field(
        default_factory=lambda: {"size": [32, 32], "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    )
    fit, input_size = None, (32, 32)
    lower_case: bool = False

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        return hash_texts(text.lower() if self.lower_case else text for _, text in prompts(names, templates))


def _image(image_id: int, count: int, **changes: Any) -> ImageBoxes:
    boxes = (np.arange(count * 4).reshape(-1, 4) + np.array([0, 0, 10, 10])).astype(np.float32)
    values = {
        "id": image_id,
        "file_name": f"{image_id}.jpg",
        "width": 64,
        "height": 48,
        "boxes": boxes,
        "labels": np.zeros(count, np.int64),
        "annotation_ids": np.arange(count) + 100 * image_id,
    }
    return ImageBoxes(**(values | changes))


def _values() -> dict[str, Any]:
    images = [_image(1, 2), _image(2, 1), _image(5, 3)]
    proposals = {
        1: Proposals(np.array([[1, 2, 30, 40]], np.float32), np.array([0.5], np.float32)),
        5: Proposals(np.array([[1, 2, 30, 40], [3, 4, 20, 20]], np.float32), np.array([0.5, 0.25], np.float32)),
    }
    return {
        "clip": _Teacher(),
        "images": images,
        "proposals": proposals,
        "nouns": Nouns(("Dog", "cat", "sky"), {1: (0, 2), 5: (1,)}),
        "classes": TextRows(("A", "b")),
        "templates": ["a {}", "the {}"],
        "recipe": PLAIN_BOX,
    }


def _inputs(values: dict[str, Any]) -> dict[Level, KeyInputs]:
    embedders = embedders_of(values["clip"], Pictures([], Path, np.zeros(1), np.zeros((0, 4))), values["recipe"])
    return level_inputs(
        values["clip"],
        box_table(values["images"], values["proposals"]),
        values["nouns"],
        values["classes"],
        values["templates"],
        embedders,
    )


def _keys(values: dict[str, Any]) -> dict[Level, str]:
    return {level: key_of(inputs) for level, inputs in _inputs(values).items()}


def _with_image(number: int, change: Callable[[ImageBoxes], ImageBoxes]) -> Callable[[dict[str, Any]], None]:
    def apply(values: dict[str, Any]) -> None:
        values["images"][number] = change(values["images"][number])

    return apply


def _moved_box(values: dict[str, Any]) -> None:
    """The last box of image 1 becomes the first of image 2: the same boxes in the same order."""
    values["proposals"].pop(1)
    one, two = values["images"][:2]
    boxes = np.concatenate([one.boxes[1:], two.boxes])
    ids = np.concatenate([one.annotation_ids[1:], two.annotation_ids])
    values["images"][:2] = [
        replace(one, boxes=one.boxes[:1], annotation_ids=one.annotation_ids[:1]),
        replace(two, boxes=boxes, annotation_ids=ids),
    ]


def _base_box_as_proposal(values: dict[str, Any]) -> None:
    """The table's rows stay as they are, but for what they are: nouns name proposals alone."""
    one, found = values["images"][0], values["proposals"][1]
    values["images"][0] = replace(one, boxes=one.boxes[:1], annotation_ids=one.annotation_ids[:1])
    values["proposals"][1] = Proposals(np.concatenate([one.boxes[1:], found.boxes]), np.array([0.9, 0.5], np.float32))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], set[Level]]] = {
    "nothing": (lambda v: None, set()),
    "weights": (lambda v: v["clip"].identity.update(weights_sha256="x"), EMBEDDED),
    "activation": (lambda v: v["clip"].identity.update(activation="quickgelu"), EMBEDDED),
    "compute dtype": (lambda v: v["clip"].identity.update(compute_dtype="bfloat16"), EMBEDDED),
    "preprocessing": (lambda v: v["clip"].preprocessing.update(mean=[0.5, 0.4, 0.5]), {IMAGE, INSTANCE, PSEUDO_LABEL}),
    "crop shape": (lambda v: v.update(recipe=CropRecipe(Shape.SQUARE)), {INSTANCE, PSEUDO_LABEL}),
    "crop scales": (lambda v: v.update(recipe=CropRecipe(scales=(1, 1.5))), {INSTANCE, PSEUDO_LABEL}),
    "tokenizer": (lambda v: setattr(v["clip"], "lower_case", True), TEXTS),
    "template": (lambda v: v.update(templates=["a {}", "this {}"]), TEXTS),
    "template order": (lambda v: v["templates"].reverse(), TEXTS),
    "class name": (lambda v: v.update(classes=TextRows(("A", "c"))), {CLASS}),
    "class order": (lambda v: v.update(classes=TextRows(("b", "A"))), {CLASS}),
    "synonym": (lambda v: v.update(classes=TextRows(("A", "b"), {"b": ("b", "c")})), {CLASS}),
    "order of synonyms": (lambda v: v.update(classes=TextRows(("A", "b"), {"b": ("c", "b")})), {CLASS}),
    "no synonym": (lambda v: v.update(classes=TextRows(("A", "b"), {})), set()),
    "class embeddings": (lambda v: v.update(classes=TextRows(("A", "b"), {}, np.eye(2, 3, dtype=np.float32))), {CLASS}),
    "vocabulary word": (
        lambda v: v.update(nouns=replace(v["nouns"], vocabulary=("Dog", "cat", "sea"))),
        {NOUN, PSEUDO_LABEL},
    ),
    "words of an image": (lambda v: v["nouns"].by_image.update({1: (0,)}), {PSEUDO_LABEL}),
    "words moved to another image": (
        lambda v: v.update(nouns=replace(v["nouns"], by_image={2: (0, 2), 5: (1,)})),
        {PSEUDO_LABEL},
    ),
    "no captions": (lambda v: v.update(nouns=replace(v["nouns"], by_image=None)), {PSEUDO_LABEL}),
    "words of an unknown image": (lambda v: v["nouns"].by_image.update({77: (0,)}), set()),
    "no nouns": (lambda v: v.update(nouns=None), {NOUN, PSEUDO_LABEL}),
    "proposal box": (lambda v: v["proposals"][1].boxes.__setitem__((0, 0), 1.5), CROPS),
    "proposal score": (lambda v: v["proposals"][1].scores.__setitem__(0, 0.75), {BOXES}),
    "proposal of another image": (lambda v: v["proposals"].update({2: v["proposals"].pop(1)}), CROPS),
    "proposal of an unknown image": (lambda v: v["proposals"].update({77: v["proposals"][1]}), set()),
    "no proposals": (lambda v: v["proposals"].clear(), CROPS),
    "file name": (_with_image(1, lambda i: replace(i, file_name="other.jpg")), PICTURES),
    "image id": (_with_image(1, lambda i: replace(i, id=3)), PICTURES),
    "image size": (_with_image(1, lambda i: replace(i, width=65)), PICTURES),
    "image order": (lambda v: v["images"].reverse(), PICTURES),
    "image left out": (lambda v: v["images"].pop(), PICTURES),
    "base box": (_with_image(0, lambda i: replace(i, boxes=i.boxes + np.float32(1e-3))), CROPS),
    "annotation id": (_with_image(0, lambda i: replace(i, annotation_ids=i.annotation_ids + 1)), {BOXES}),
    "class of a box": (_with_image(0, lambda i: replace(i, labels=i.labels + 1)), set()),
    "box order": (
        _with_image(0, lambda i: replace(i, boxes=i.boxes[::-1], annotation_ids=i.annotation_ids[::-1])),
        CROPS,
    ),
    "base box as a proposal": (_base_box_as_proposal, {BOXES, PSEUDO_LABEL}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_key_changes_with_its_inputs_alone(name: str) -> None:
    change, expected = CHANGES[name]
    before = _keys(_values())
    assert before.keys() == ALL
    values = _values()
    change(values)
    after = _keys(values)
    assert {level for level in ALL if before.get(level) != after.get(level)} == expected


def test_box_moved_to_the_next_image_is_another_table() -> None:
    values, moved = _values(), _values()
    values["proposals"].pop(1)
    _moved_box(moved)
    one, other = (box_table(v["images"], v["proposals"]) for v in (values, moved))
    np.testing.assert_array_equal(one.box, other.box)
    before, after = _keys(values), _keys(moved)
    assert {level for level in ALL if before[level] != after[level]} == CROPS


def test_another_schema_is_another_key_of_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _keys(_values())
    monkeypatch.setattr(hdovd.pipelines.extraction.identities, "SCHEMA_VERSION", 99)
    after = _keys(_values())
    assert {level for level in ALL if before[level] != after[level]} == ALL


def test_inputs_are_json_values() -> None:
    """They are compared with what a product's metadata gives back: a tuple there would never be equal."""
    for inputs in _inputs(_values()).values():
        assert json.loads(json.dumps(inputs)) == inputs


def test_training_asks_for_a_part_of_what_extraction_wrote() -> None:
    """Training knows images and base boxes, and no proposals."""
    written, asked = _inputs(_values()), data_inputs(_values()["images"])
    assert asked.keys() == {BOXES, INSTANCE, IMAGE}
    for level, inputs in asked.items():
        assert inputs == {name: written[level][name] for name in inputs}
        assert inputs


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("base box", {BOXES}),
        ("annotation id", {BOXES}),
        ("file name", {BOXES, INSTANCE, IMAGE}),
        ("image left out", {BOXES, INSTANCE, IMAGE}),
        ("class of a box", set()),
    ],
)
def test_training_notices_what_concerns_it(name: str, levels: set[Level]) -> None:
    values = _values()
    CHANGES[name][0](values)
    one, other = data_inputs(_values()["images"]), data_inputs(values["images"])
    assert {level for level in one if one[level] != other[level]} == levels
