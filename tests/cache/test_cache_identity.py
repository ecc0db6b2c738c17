"""Keys follow from inputs: from each of them, and from nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hdovd.cache import differences, hash_tables, key_of, require_seal
from hdovd.cache.identity import hash_texts, sealed


def test_key_does_not_depend_on_the_order_of_names() -> None:
    assert key_of({"a": 1, "b": {"x": [1, 2], "y": None}}) == key_of({"b": {"y": None, "x": [1, 2]}, "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {"b": 1}, {"a": [1]}, {}], ids=str)
def test_key_depends_on_every_value(other: dict[str, object]) -> None:
    assert key_of(other) != key_of({"a": 1})


@pytest.mark.parametrize(
    "other",
    [
        [np.array([[1.0, 2.0]], np.float32), np.array([3.0], np.float32)],  # another shape
        [np.array([1.0], np.float32), np.array([2.0, 3.0], np.float32)],  # a row moved to the next table
        [np.array([1.0, 2.0], np.float64), np.array([3.0], np.float32)],  # another type
        [np.array([2.0, 1.0], np.float32), np.array([3.0], np.float32)],
        [np.array([1.0, 2.0], np.float32), np.nextafter(np.array([3.0], np.float32), 4, dtype=np.float32)],
        [np.array([1.0, 2.0], np.float32)],
    ],
)
def test_table_hash_depends_on_type_shape_and_content(other: list[np.ndarray]) -> None:
    assert hash_tables(other) != hash_tables([np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)])


def test_table_hash_does_not_depend_on_memory_layout() -> None:
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert hash_tables([np.asfortranarray(table)]) == hash_tables([table])
    assert hash_tables([np.repeat(table, 2, axis=0)[::2]]) == hash_tables([table])


@pytest.mark.parametrize("other", [["b", "a"], ["ab"], ["a", "b", ""], ["a", "B"]], ids=str)
def test_text_hash_depends_on_order_and_borders(other: list[str]) -> None:
    assert hash_texts(other) != hash_texts(["a", "b"])


def test_differences_go_down_to_the_value_that_differs() -> None:
    expected = {"clip": {"weights": "w1", "preprocessing": {"size": 32}}, "crop": "box"}
    found = {"clip": {"weights": "w1", "preprocessing": {"size": 64}}, "extra": True}
    lines = differences(expected, found)
    assert [line.split(" differs")[0] for line in lines] == ["clip.preprocessing.size", "crop", "extra"]
    assert "expected 32, the cache has 64" in lines[0]
    assert differences(expected, expected) == []


def test_differences_cut_long_values() -> None:
    (line,) = differences({"names": ["class"] * 500}, {"names": []})
    assert len(line) < 300


def test_no_flipped_bit_of_a_sealed_record_passes() -> None:
    """In the name of the seal too: without it, the record would be one of an older version."""
    tree = sealed({"schema_version": 2, "levels": {"image": {"key": "a1"}}, "path": "/runs/1"})
    text = json.dumps(tree).encode()
    for at in range(len(text)):
        for bit in range(8):
            flipped = text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]
            try:
                read = json.loads(flipped)
            except ValueError:
                continue
            if read != tree:
                with pytest.raises(ValueError, match="checksum"):
                    require_seal(read)
    require_seal({"path": "/runs/1", "weights": "0" * 64})  # of an older version
