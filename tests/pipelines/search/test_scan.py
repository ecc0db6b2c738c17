"""The scan of a set against plain products of all its rows at once, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.core import HdovdError
from hdovd.pipelines.search import nearest
from hdovd.pipelines.search.nearest import Best, alike_pairs, best_rows, chosen_rows, mean_row


@pytest.fixture
def opened(cache: Path) -> FeatureCache:
    return FeatureCache(cache)


def _rows(opened: FeatureCache) -> np.ndarray:
    """All rows in float64, of norm 1."""
    wide = opened.rows_between(0, len(opened.row_images())).embedding.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


@pytest.mark.parametrize("block", [7, 2_048])
def test_the_best_rows_are_those_of_a_product_of_all(
    block: int, opened: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "BLOCK_ROWS", block)
    rows = _rows(opened)
    query = normalised_rows(rows[5:6] + 0.5 * rows[9:10])
    expected = rows @ query[0].astype(np.float64)
    best = best_rows(opened, query, 12, lambda _, cosines: cosines[:, 0])
    assert best.rows.tolist() == np.argsort(-expected, kind="stable")[:12].tolist()
    assert best.values == pytest.approx(np.sort(expected)[:-13:-1], abs=1e-6)


def test_blocks_are_all_rows_in_order_mapped_or_not(cache: Path) -> None:
    for mapped in (True, False):
        opened = FeatureCache(cache, mapped=mapped)
        count = len(opened.row_images())
        found = list(opened.blocks(10))
        assert [start for start, _ in found] == list(range(0, count, 10))
        whole = opened.rows_between(0, count)
        for name in ("embedding", "box", "noun"):
            joined = np.concatenate([getattr(rows, name) for _, rows in found])
            assert np.array_equal(joined, getattr(whole, name))


def test_a_row_has_its_place_in_its_image(opened: FeatureCache) -> None:
    images = opened.row_images().tolist()
    for row, image_id in enumerate(images):
        assert opened.place_of(row) == (image_id, row - images.index(image_id))


def test_best_keeps_the_first_of_equal_values_and_no_value_that_is_none() -> None:
    best = Best(3)
    best.add(np.array([1.0, np.nan, 2.0], np.float32), np.array([0, 1, 2]))
    best.add(np.array([1.0, 3.0, 1.0], np.float32), np.array([3, 4, 5]))
    assert list(best.pairs()) == [(3.0, 4), (2.0, 2), (1.0, 0)]
    assert list(Best(2).pairs()) == []


def test_pairs_are_those_of_all_products_and_of_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK_ROWS", 8)
    rng = np.random.default_rng(0)
    rows = normalised_rows(rng.standard_normal((21, 3)))
    groups = np.arange(21) // 2
    whole = rows @ rows.T
    expected = {(i, j) for i in range(21) for j in range(i + 1, 21) if whole[i, j] >= 0.9 and i // 2 != j // 2}
    assert len(expected) > 3
    best = alike_pairs(rows, groups, 999, 0.9)
    assert {tuple(pair) for _, pair in best.pairs()} == expected
    assert best.values.tolist() == sorted(best.values.tolist(), reverse=True)


def test_too_many_rows_are_not_compared(opened: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_ten(rows: InstanceRows) -> np.ndarray:
        return np.arange(len(rows.box)) < 10

    assert chosen_rows(opened, first_ten).tolist() == list(range(10))
    assert mean_row(opened, first_ten) == pytest.approx(_rows(opened)[:10].sum(axis=0), abs=1e-5)
    monkeypatch.setattr(nearest, "MOST_COMPARED", 9)
    with pytest.raises(HdovdError, match="10 boxes to compare each with each, 9 at most"):
        chosen_rows(opened, first_ten)
