"""The table of all rows: its order, the images of a slice of it, and which rows of another table are the same."""

from __future__ import annotations

import numpy as np
import pytest

from hdovd.cache import Source
from hdovd.data import ImageBoxes
from hdovd.pipelines.extraction.identities import BoxTable, box_table, match_rows
from hdovd.pipelines.proposal_files.file import Proposals


def _table(base: list[int], proposals: dict[int, int]) -> BoxTable:
    """Images 10, 20, ... with as many base boxes; box k of an image begins at x = k, proposals at x = 100."""
    images = [
        ImageBoxes(
            10 * (n + 1), f"{n}.jpg", 640, 480, _boxes(0, count), np.zeros(count, np.int64), np.arange(count) + 1000 * n
        )
        for n, count in enumerate(base)
    ]
    return box_table(
        images,
        {
            image: Proposals(_boxes(100, count), np.linspace(1, 0, count, dtype=np.float32))
            for image, count in proposals.items()
        },
    )


def _boxes(x: int, count: int) -> np.ndarray:
    left = np.arange(x, x + count, dtype=np.float32)
    return np.stack([left, left * 0, left + 5, left * 0 + 7], axis=1)


def test_rows_go_image_by_image_base_boxes_before_proposals() -> None:
    table = _table([2, 0, 1], {10: 1, 20: 2})
    assert table.image_id.tolist() == [10, 20, 30]
    assert table.image_size.tolist() == [[640, 480]] * 3
    assert table.offset.tolist() == [0, 3, 5, 6]
    assert table.box[:, 0].tolist() == [0, 1, 100, 100, 101, 0]
    assert table.source.tolist() == [
        Source.BASE_BOX,
        Source.BASE_BOX,
        Source.PROPOSAL,
        Source.PROPOSAL,
        Source.PROPOSAL,
        Source.BASE_BOX,
    ]
    assert table.annotation_id.tolist() == [0, 1, -1, -1, -1, 2000]
    assert table.score.tolist() == [1, 1, 1, 1, 0, 1]
    assert len(set(table.image_hash.tolist())) == 3
    assert {name: getattr(table, name).dtype.name for name in BoxTable.__slots__} == {
        "image_id": "int64",
        "image_hash": "uint64",
        "image_size": "int32",
        "offset": "int64",
        "box": "float32",
        "source": "uint8",
        "score": "float32",
        "annotation_id": "int64",
    }


def test_empty_table() -> None:
    table = _table([], {})
    assert table.offset.tolist() == [0]
    assert table.box.shape == (0, 4)
    assert list(table.images_of(0, 0)) == []


@pytest.mark.parametrize("base", [[2, 0, 3, 0, 0, 1], [0, 0, 4], [1] * 5, [5, 0]], ids=str)
def test_images_of_a_slice_are_those_with_rows_in_it(base: list[int]) -> None:
    table = _table(base, {})
    rows = np.repeat(np.arange(len(base)), base)
    for start in range(len(rows) + 1):
        for stop in range(start, len(rows) + 1):
            found = table.images_of(start, stop)
            with_rows = [n for n in found if base[n]]
            assert with_rows == sorted(set(rows[start:stop].tolist()))
            assert len(found) <= len(with_rows) + base.count(0)


def _random_columns(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    return [
        rng.integers(0, 4, rows),
        rng.integers(0, 3, rows).astype(np.uint64),
        rng.integers(0, 2, (rows, 4)).astype(np.float32),
    ]


def test_matched_rows_are_the_same_rows() -> None:
    """Against a search one by one, with repeated rows on both sides; of several that are the same, any will do."""
    rng = np.random.default_rng(0)
    for wanted, have in ((50, 40), (0, 5), (5, 0), (1, 1)):
        one, other = (_random_columns(rng, n) for n in (wanted, have))
        a, b = ([(int(i), int(h), *box.tolist()) for i, h, box in zip(*table, strict=True)] for table in (one, other))
        found = match_rows(one, other)
        assert found.shape == (wanted,)
        assert [row >= 0 for row in found] == [row in b for row in a]
        assert all(b[match] == a[row] for row, match in enumerate(found) if match >= 0)


def test_match_tells_nearly_equal_rows_apart() -> None:
    box = np.array([[1, 2, 3, 4]], np.float32)
    near = np.nextafter(box, 9, dtype=np.float32)
    ids = np.array([7])
    assert match_rows([ids, box], [ids, box]).tolist() == [0]
    assert match_rows([ids, box], [ids, near]).tolist() == [-1]
    assert match_rows([ids, box], [ids + (1 << 32), box]).tolist() == [-1]
