"""Writing products: nothing that is not whole is taken, and a product is the same whoever began it and in whatever
order it was filled.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import TABLE_ARRAYS, Catalog, Level, Product
from hdovd.cache.store import LocalFolder
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError

D = 8
Begin = Callable[..., ProductWriter]
Contents = Callable[[Path], dict[str, str]]


def _unit(count: int) -> np.ndarray:
    return np.eye(D, dtype=np.float32)[np.arange(count) % D]


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0, 0.5, 1.01, 0.0], ids=str)
def test_embedding_that_is_not_normalised_is_refused_with_its_row(begin: Begin, tmp_path: Path, value: float) -> None:
    writer = begin(Level.INSTANCE, part_rows=2)
    rows = _unit(2)
    rows[1] = 0
    rows[1, 3] = value
    with pytest.raises(HdovdError, match=r"instance .*row 3 has norm.*--precision fp32 \(1 rows\)"):
        writer.write_part(1, {"embedding": rows})
    assert not writer.product.is_finished(1)
    assert not (tmp_path / "cache" / writer.product.prefix / "embedding" / "c").exists()


def test_name_embedding_that_is_nan_is_refused_with_its_name(begin: Begin) -> None:
    rows = _unit(4)
    rows[1] = np.nan
    with pytest.raises(HdovdError, match="'dog'"):
        begin().write_part(0, {"embedding": rows})


def test_zero_row_needs_an_image_that_failed(begin: Begin) -> None:
    """Zeros stand for an image that could not be read; beside one, other rows are still checked."""
    rows = _unit(4)
    rows[1:] = 0
    writer = begin(Level.INSTANCE)
    writer.write_part(0, {"embedding": rows}, {81: "broken"})
    assert writer.product.failed() == {81: "broken"}
    assert writer.product.failed_parts() == [0]
    rows[2] = 0.5
    with pytest.raises(HdovdError, match="row 2"):
        writer.write_part(0, {"embedding": rows}, {81: "broken"})


@pytest.mark.parametrize("shape", [(3, D), (5, D), (4, D - 1), (4,), (4, D, 1)], ids=str)
def test_wrong_shape_is_refused(begin: Begin, shape: tuple[int, ...]) -> None:
    writer = begin(Level.INSTANCE)
    with pytest.raises(HdovdError, match=rf"part 0: embedding has shape \({shape[0]},.*expected \(4, {D}\)"):
        writer.write_part(0, {"embedding": np.ones(shape, np.float32) / np.sqrt(D)})
    assert not writer.product.finished()


def test_last_part_is_as_long_as_its_rows(begin: Begin) -> None:
    writer = begin(Level.INSTANCE, part_rows=3)
    assert writer.product.parts == 2
    with pytest.raises(HdovdError, match=r"part 1: .*\(3, 8\), expected \(1, 8\)"):
        writer.write_part(1, {"embedding": _unit(3)})
    writer.write_part(1, {"embedding": _unit(1)})
    assert writer.product.missing() == [0]
    assert not writer.product.whole
    writer.write_part(0, {"embedding": _unit(3)})
    assert writer.product.whole


@pytest.mark.parametrize("level", [Level.BOXES, Level.INSTANCE, Level.IMAGE], ids=str)
def test_missing_table_is_an_error(begin: Begin, tmp_path: Path, level: Level) -> None:
    tables = {name: np.zeros(3, dtype) for name, dtype in TABLE_ARRAYS[level].items()}
    for wrong in ({}, dict(list(tables.items())[1:]), tables | {"noun": np.zeros(3)}):
        with pytest.raises(ValueError, match="image_id"):
            begin(level, tables=wrong)
    assert Catalog(tmp_path / "cache").products() == []


@pytest.mark.parametrize(
    ("part_rows", "good"),
    [(1, True), (1000, True), (1024, True), (4096, True), (0, False), (-8, False), (1025, False), (1536, False)],
)
def test_rows_of_a_part_fit_chunks(begin: Begin, tmp_path: Path, part_rows: int, good: bool) -> None:
    if good:
        assert begin(part_rows=part_rows).product.part_rows == part_rows
        return
    with pytest.raises(HdovdError, match=f"{part_rows} rows a part.*at most 1024, or a multiple"):
        begin(part_rows=part_rows)
    assert Catalog(tmp_path / "cache").products() == []


@pytest.mark.parametrize("level", [Level.CLASS, Level.INSTANCE], ids=str)
def test_beginning_again_changes_nothing(
    begin: Begin, tmp_path: Path, contents: Contents, level: Level, untouched: Callable[..., Any]
) -> None:
    """And a product that is there keeps its own size of parts and notes, whatever a later process asks for."""
    begin(level, part_rows=3, made_with={"batch_size": 7}).write_part(0, {"embedding": _unit(3)})
    with untouched(tmp_path / "cache"):
        begin(level, part_rows=3, made_with={"batch_size": 7})
        other = begin(level, part_rows=1, made_with={"batch_size": 9})
    assert other.product.part_rows == 3
    assert other.product.attributes["made_with"] == {"batch_size": 7}
    other.write_part(1, {"embedding": _unit(1)})
    assert other.product.whole
    once = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    writer = begin(level, part_rows=3, made_with={"batch_size": 7})
    for part, rows in ((1, 1), (0, 3)):  # in another order
        writer.write_part(part, {"embedding": _unit(rows)})
    assert contents(tmp_path / "cache") == once


def test_product_that_was_only_begun_is_begun_anew(begin: Begin, tmp_path: Path, contents: Contents) -> None:
    """A process may die between any two objects: of the tables it had written, none counts until their record is
    there."""
    product = begin(Level.INSTANCE).product
    whole = contents(tmp_path / "cache")
    folder = tmp_path / "cache" / product.prefix
    for name in ("parts/tables.json", "box/zarr.json", "box/c/0/0", "embedding/zarr.json"):
        (folder / name).unlink()
        if name != "parts/tables.json":
            (folder / "parts" / "tables.json").unlink()
        assert not Product(product.folder, product.level, product.key).whole
        begin(Level.INSTANCE)
        assert contents(tmp_path / "cache") == whole


def test_record_tells_size_and_checksum_of_every_object(begin: Begin, tmp_path: Path, contents: Contents) -> None:
    writer = begin(Level.INSTANCE, part_rows=3)
    for part, rows in ((0, 3), (1, 1)):
        writer.write_part(part, {"embedding": _unit(rows)})
    folder = tmp_path / "cache" / writer.product.prefix
    told = {name: entry for record in writer.product.records().values() for name, entry in record["objects"].items()}
    there = {name: digest for name, digest in contents(folder).items() if not name.startswith("parts/")}
    assert {name: entry["sha256"] for name, entry in told.items()} == there
    assert {name: entry["bytes"] for name, entry in told.items()} == {
        name: (folder / name).stat().st_size for name in there
    }


@pytest.mark.parametrize("moment", ["sizes", "exists"])
def test_one_that_began_a_moment_ago_elsewhere_keeps_its_parts(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another machine, whose `made_with` is another, begins and writes a part just after this one has looked."""
    look, others = getattr(LocalFolder, moment), list[ProductWriter]()

    def looked(self: LocalFolder, name: str) -> Any:
        found = look(self, name)
        if not others and name.startswith("class/"):
            monkeypatch.setattr(LocalFolder, moment, look)
            others.append(begin(made_with={"torch": "another"}))
            others[0].write_part(0, {"embedding": _unit(4)})
        return found

    monkeypatch.setattr(LocalFolder, moment, looked)
    assert begin(made_with={"torch": "this"}).product.whole
