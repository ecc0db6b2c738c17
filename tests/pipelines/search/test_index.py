"""An index of a set's rows: what it finds against the scan, whose it is, and what damages it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import Catalog, FeatureSet, Level, Product
from hdovd.cache.identity import table_inputs
from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.writer import ProductWriter
from hdovd.core import LOGGER, HdovdError
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.listing import Garbage, delete_garbage, find_garbage, info_lines, product_lines
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.extraction.source import CacheSet
from hdovd.pipelines.search import nearest
from hdovd.pipelines.search.config import BoxSource, Duplicates, SearchConfig
from hdovd.pipelines.search.nearest import Best, Choice, RowIndex, best_rows, index_part, index_rows
from hdovd.pipelines.search.search import search

pytest.importorskip("faiss")
D, ROWS, FAILED = 32, 6_000, 7  # FAILED: an image whose picture could not be read; an image has ten rows


def _every(rows: InstanceRows) -> np.ndarray:
    return np.ones(len(rows.box), bool)


def _scan(cache: FeatureCache, query: np.ndarray, count: int, chosen: Choice = _every) -> Best:
    return best_rows(cache, query[None], count, lambda rows, found: np.where(chosen(rows), found[:, 0], np.nan))


def _write(folder: Path, seed: int = 0, part: int | None = None) -> FeatureCache:
    """A cache of rows about 60 centres, half of them base boxes; of one part alone if that is given."""
    rng, ids = np.random.default_rng(seed), np.arange(ROWS // 10)
    centres = rng.standard_normal((60, D))
    rows = normalised_rows(centres[rng.integers(0, 60, ROWS)] + 0.6 * rng.standard_normal((ROWS, D)))
    rows[10 * FAILED : 10 * FAILED + 10] = 0
    rng = np.random.default_rng(9)  # boxes are the same whatever the rows are
    corner = rng.uniform(0, 30, (ROWS, 2))
    tables: dict[str, np.ndarray] = {"image_id": ids, "image_hash": ids.astype(np.uint64)}
    tables |= {"offset": np.arange(0, ROWS + 1, 10), "box": np.concatenate([corner, corner + 30], 1, dtype=np.float32)}
    more: dict[str, np.ndarray] = {"image_size": np.full((len(ids), 2), 64, np.int32)}
    more |= {"source": np.tile(np.repeat([0, 1], 5), len(ids)).astype(np.uint8)}
    more |= {"score": rng.uniform(size=ROWS).astype(np.float32)}
    more |= {"annotation_id": np.where(more["source"] == 0, np.arange(ROWS), -1)}
    catalog, levels = Catalog.create(folder), {}
    for level, its_tables, dim in ((Level.BOXES, tables | more, 0), (Level.INSTANCE, tables, D)):
        inputs = {"made_up": level, **table_inputs(level, its_tables)}
        writer = ProductWriter.begin(
            catalog.folder, level, inputs, rows=ROWS, part_rows=2_048, dim=dim, tables=its_tables
        )
        for number in range(writer.product.parts) if part is None else [part] * (dim > 0):
            start, stop = writer.product.rows_of(number)
            failed = {FAILED: "gone"} if start <= 10 * FAILED < stop else {}
            writer.write_part(number, {"embedding": rows[start:stop].astype(np.float16)}, failed)
        levels[level] = writer.product.key
    catalog.write_set("default", FeatureSet(levels))
    return FeatureCache(folder)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed") / "cache"
    _write(folder)
    index_rows(CacheSet(cache=folder))
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was logged since it was last asked."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    monkeypatch.setattr(LOGGER, "disabled", False)
    caplog.set_level("INFO")

    def text() -> str:
        found = "\n".join(caplog.messages)
        caplog.clear()
        return found

    return text


def _objects(folder: Path) -> list[Path]:
    """Records and data of indices."""
    return sorted(folder.rglob("*index-*"))


def _queries(count: int) -> np.ndarray:
    return normalised_rows(np.random.default_rng(5).standard_normal((count, D)))


def test_asked_for_everything_it_finds_what_the_scan_finds(indexed: Path) -> None:
    cache = FeatureCache(indexed)
    index = RowIndex(cache)
    for query in _queries(3):
        found, exact = index.best(query, ROWS, _every), _scan(cache, query, ROWS)
        assert len(found.rows) == ROWS - 10  # rows of zeros are nobody's
        assert not set(found.rows.tolist()) & set(range(10 * FAILED, 10 * FAILED + 10))
        assert found.values == pytest.approx(exact.values[: len(found.values)], abs=1e-6)
        assert set(found.rows[:100].tolist()) == set(exact.rows[:100].tolist())


def test_it_finds_nearly_all_of_the_best_with_their_exact_cosines(indexed: Path) -> None:
    cache = FeatureCache(indexed)
    index, right = RowIndex(cache), 0
    rows = normalised_rows(cache.rows_between(0, ROWS).embedding)
    own = rows[np.random.default_rng(1).choice(np.flatnonzero(rows.any(axis=1)), 40, replace=False)]
    for query in [*own, *_queries(40)]:
        found = index.best(query, 20, _every)
        assert found.values == pytest.approx(rows[found.rows] @ query, abs=1e-6)
        right += len(set(found.rows.tolist()) & set(_scan(cache, query, 20).rows.tolist()))
    assert right / (80 * 20) > 0.95


def test_rare_rows_are_found_by_more_candidates_or_by_the_scan(indexed: Path, said: Callable[[], str]) -> None:
    cache, query = FeatureCache(indexed), _queries(1)[0]
    index, compared = RowIndex(cache), "all rows are compared"
    order = _scan(cache, query, ROWS).rows.tolist()

    def of(numbers: list[int]) -> Choice:
        scores = cache.rows_between(0, ROWS).score[numbers]
        return lambda rows: np.isin(rows.score, scores)

    for wanted, scanned in ((order[:3], False), (order[20:80:20], False), (order[900:903], True)):
        assert index.best(query, 3, of(wanted)).rows.tolist() == wanted
        assert (compared in said()) is scanned
    assert index.best(query, 4, of(order[:3])).rows.tolist() == order[:3]
    assert compared in said()


def test_the_command_line_searches_by_it(indexed: Path) -> None:
    asked: dict[str, Any] = {"cache": indexed, "like": ("3:1",), "device": "cpu", "count": 5}
    for more in ({}, {"source": BoxSource.BASE}, {"score": 0.9}, {"min_side": 29.0}):
        found, exact = (search(SearchConfig(**asked, **more, index=index)) for index in (True, False))
        assert [hit.place for hit in found] == [hit.place for hit in exact]
        assert [hit.cosine for hit in found] == pytest.approx([hit.cosine for hit in exact], abs=1e-6)
    for other in ({"duplicates": Duplicates.BOXES}, {"suspicious": True}, {"untypical": "cat"}):
        with pytest.raises(HdovdError, match="--index is for what is like something"):
            SearchConfig(cache=indexed, index=True, **other)


def test_it_is_built_once_and_anew_for_other_rows(tmp_path: Path, said: Callable[[], str]) -> None:
    folder = tmp_path / "cache"
    cache = _write(folder)
    with pytest.raises(HdovdError, match=f"has no index of instance .* as it is now: hdovd cache index {folder}"):
        RowIndex(cache)
    index_rows(CacheSet(cache=folder))
    first, lines = _objects(folder), said()
    assert "built in" in lines
    assert "by 10 of its rows;" in lines
    index_rows(CacheSet(cache=folder))
    assert (_objects(folder), "built in" in said()) == (first, False)
    _write(folder, seed=1, part=1)  # as --retry-failed makes a part again, under the same key
    with pytest.raises(HdovdError, match="as it is now"):
        RowIndex(FeatureCache(folder))
    index_rows(CacheSet(cache=folder))
    assert "built in" in said()
    again = _objects(folder)
    assert len(again) == len(first) == 2
    assert not set(again) & set(first)


def test_what_made_it_decides_its_key(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(Catalog(indexed).folder, Level.INSTANCE, FeatureCache(indexed).key(Level.INSTANCE))
    part, inputs = index_part(product)
    assert inputs["instance"] == product.key
    for name in nearest.SETTINGS:
        monkeypatch.setitem(nearest.SETTINGS, name, "other")
        assert index_part(product)[0] != part
        monkeypatch.undo()
    assert index_part(product) == (part, inputs)


def test_cache_commands_know_it(tmp_path: Path, said: Callable[[], str]) -> None:
    folder = tmp_path / "cache"
    _write(folder)
    assert "indexed" not in "\n".join(product_lines(Catalog(folder)))
    index_rows(CacheSet(cache=folder))
    listed = "\n".join(product_lines(Catalog(folder))), "\n".join(info_lines(Catalog(folder), None))
    assert [text.count("whole, indexed") for text in listed] == [1, 1]
    assert not check_cache(CheckConfig(cache=folder)).findings
    catalog = Catalog(folder)
    assert find_garbage(catalog) == Garbage()
    delete_garbage(catalog, find_garbage(catalog, "default"), unfinished=False, without_set="default")
    assert not _objects(folder)


def test_a_damaged_index_is_refused_found_and_made_again(tmp_path: Path, said: Callable[[], str]) -> None:
    folder = tmp_path / "cache"
    _write(folder)
    index_rows(CacheSet(cache=folder))
    data, record = _objects(folder)
    sound = data.read_bytes()
    for damaged in (sound[:-1], b"\0" + sound[1:], sound[:5_000] + b"\1\2\3" + sound[5_003:]):
        data.write_bytes(damaged)
        with pytest.raises(HdovdError, match=f"{data} is damaged .*it is not what was written there"):
            RowIndex(FeatureCache(folder))
        assert [finding.part for finding in check_cache(CheckConfig(cache=folder)).findings] == [record.stem]
    said()
    check_cache(CheckConfig(cache=folder, repair=True))
    assert f"hdovd cache index {folder}" in said()
    assert not record.exists()
    assert not check_cache(CheckConfig(cache=folder)).findings
    index_rows(CacheSet(cache=folder))
    assert _objects(folder) == [data, record]
    assert RowIndex(FeatureCache(folder)).rows == ROWS


@pytest.mark.parametrize("killed_at", ["index-", "parts/index-"])
def test_a_killed_build_leaves_no_index_and_the_next_one_goes_through(
    killed_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    _write(folder)
    child = os.fork()
    if not child:
        replace = os.replace

        def die(source: Any, target: Any) -> None:
            if f"/{killed_at}" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        monkeypatch.setattr(os, "replace", die)
        index_rows(CacheSet(cache=folder))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(HdovdError, match="has no index"):
        RowIndex(FeatureCache(folder))
    assert not check_cache(CheckConfig(cache=folder)).findings
    index_rows(CacheSet(cache=folder))
    Catalog(folder).folder.sweep()
    assert len(_objects(folder)) == 2
    assert not [*folder.rglob(".partial-*")]
    assert RowIndex(FeatureCache(folder)).best(_queries(1)[0], 5, _every).rows.size == 5


def test_an_index_in_an_object_store_is_held_in_memory(indexed: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(indexed), "/indexed", recursive=True)
    cache, query = FeatureCache("memory://indexed"), _queries(1)[0]
    index_rows(CacheSet(cache="memory://indexed"))
    expected = RowIndex(FeatureCache(indexed)).best(query, 9, _every).rows.tolist()
    assert RowIndex(cache).best(query, 9, _every).rows.tolist() == expected


def test_nothing_to_index_and_no_faiss(tmp_path: Path, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HdovdError, match="no feature cache at"):
        index_rows(CacheSet(cache=tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(HdovdError, match=r'an index needs faiss: pip install "hdovd\[index\]"'):
        search(SearchConfig(cache=indexed, like=("3:1",), index=True))


def test_texts_of_a_set_are_asked_for_too(copied_cache: Path, kept: list[int], said: Callable[[], str]) -> None:
    index_rows(CacheSet(cache=copied_cache))
    lines = said()
    assert "recall@20 against the exact scan: 1.000 by" in lines
    assert "of its texts" in lines
    asked: dict[str, Any] = {"cache": copied_cache, "like": (f"{kept[0]}:0",), "device": "cpu", "count": 9_999}
    found, exact = ({hit.place for hit in search(SearchConfig(**asked, index=index))} for index in (True, False))
    assert found == exact
    assert not check_cache(CheckConfig(cache=copied_cache)).findings


def test_the_list_of_products_tells_an_index_of_these_rows_alone(indexed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(indexed, tmp_path / "cache"))
    assert any("whole, indexed" in line for line in product_lines(Catalog(cache)))
    (record,) = cache.glob("instance/*/parts/000000.json")
    tree = json.loads(record.read_text())
    tree["objects"]["embedding/c/0/0"]["sha256"] = "0" * 64  # as when rows are made again
    record.write_text(json.dumps(tree))
    lines = product_lines(Catalog(cache))
    assert any("whole" in line for line in lines)
    assert not any("indexed" in line for line in lines)
