"""`hdovd cache export --to lance`: LanceDB opens a table that says what the Parquet file says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hdovd.cache.reader import FeatureCache
from hdovd.cli.main import app
from hdovd.core import HdovdError
from hdovd.pipelines.extraction import export
from hdovd.pipelines.extraction.export import LANCE_TABLE, export_lance, export_parquet
from hdovd.pipelines.extraction.source import ExportConfig, ExportForm

lancedb = pytest.importorskip("lancedb")


def test_lancedb_opens_what_parquet_holds(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 32)  # several batches
    export_parquet(ExportConfig(cache=cache, to=ExportForm.PARQUET, out=tmp_path / "boxes.parquet"))
    words = ["cache", "export", str(cache), "--to", "lance", "--out", str(tmp_path / "lance")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    rows = len(FeatureCache(cache).row_images())
    assert f"wrote {tmp_path / 'lance'}: table {LANCE_TABLE} of {rows} boxes" in done.output
    table, wanted = (
        lancedb.connect(tmp_path / "lance").open_table(LANCE_TABLE),
        pq.read_table(tmp_path / "boxes.parquet"),
    )
    assert table.to_arrow().to_pylist() == wanted.to_pylist()
    row = wanted.to_pylist()[5]
    found = table.search(row["embedding"]).metric("cosine").limit(3).to_list()
    assert found[0]["_distance"] == pytest.approx(0, abs=1e-5)
    cosines = [1 - np.dot(one["embedding"], row["embedding"]) for one in found]
    assert [one["_distance"] for one in found] == pytest.approx(cosines, abs=1e-3)


def test_a_table_that_is_there_is_replaced_and_others_are_left(cache: Path, tmp_path: Path) -> None:
    database = lancedb.connect(tmp_path / "lance")
    database.create_table("mine", [{"a": 1}])
    database.create_table(LANCE_TABLE, [{"a": 1}, {"a": 2}])
    export_lance(ExportConfig(cache=cache, to=ExportForm.LANCE, out=tmp_path / "lance"))
    assert database.open_table("mine").count_rows() == 1
    assert database.open_table(LANCE_TABLE).count_rows() == len(FeatureCache(cache).row_images())


def test_an_export_that_fails_leaves_what_was_there(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(cache=cache, to=ExportForm.LANCE, out=tmp_path / "lance")
    database = lancedb.connect(tmp_path / "lance")
    database.create_table(LANCE_TABLE, [{"a": 1}])
    monkeypatch.setattr(export, "GROUP_ROWS", 32)
    read = FeatureCache.rows_between

    def fail(self: FeatureCache, start: int, stop: int, **more: bool) -> object:
        if start >= 64:
            raise OSError(28, "No space left on device")
        return read(self, start, stop, **more)

    monkeypatch.setattr(FeatureCache, "rows_between", fail)
    with pytest.raises(HdovdError, match=r"lance cannot be written: .*No space left"):
        export_lance(config)
    assert database.open_table(LANCE_TABLE).to_arrow().to_pylist() == [{"a": 1}]


def test_bad_input(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HdovdError, match="expected a folder on this machine, for --to lance"):
        export_lance(ExportConfig(cache=cache, to=ExportForm.LANCE, out="s3://bucket/lance"))
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(HdovdError, match=r"pip install 'hdovd\[lance\]'"):
        export_lance(ExportConfig(cache=cache, to=ExportForm.LANCE, out=tmp_path / "lance"))
    assert list(tmp_path.iterdir()) == []
