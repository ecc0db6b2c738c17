"""`hdovd cache export --to parquet`: the file holds what the cache's reader says, and is whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hdovd.cache import Level, Source
from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.cli.main import app
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.extraction import export
from hdovd.pipelines.extraction.export import export_parquet
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.source import ExportConfig, ExportForm


def _export(cache: Path, folder: Path, log: Callable[[str], None] = lambda _: None, **source: Any) -> pa.Table:
    with lines_to(log):
        export_parquet(ExportConfig(cache=cache, **source, to=ExportForm.PARQUET, out=folder / "boxes.parquet"))
    return pq.read_table(folder / "boxes.parquet")


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_between_are_those_of_their_images(cache: Path, mapped: bool) -> None:
    opened = FeatureCache(cache, mapped=mapped)
    images = opened.row_images()
    every = opened.rows_between(0, len(images))
    for number in opened.image_ids().tolist():
        for name in every.__slots__:
            assert np.array_equal(getattr(opened.instances(number), name), getattr(every, name)[images == number]), (
                number,
                name,
            )
    assert np.array_equal(opened.rows_between(3, 50).embedding, every.embedding[3:50])
    assert opened.rows_between(0, 0).embedding.shape == (0, opened.dim)


def test_the_file_says_what_the_cache_says(
    cache: Path, world: Path, tmp_path: Path, untouched: Callable[[Path], Any]
) -> None:
    with untouched(cache):
        table = _export(cache, tmp_path)
    opened, protocol, nouns = (
        FeatureCache(cache),
        load_protocol(str(world / "protocol.toml")),
        FeatureCache(cache).names(Level.NOUN),
    )
    split, at, rows = DataPaths(world).load("train2017", protocol, base_only=True), 0, table.to_pylist()
    for image in split.images:
        found, labels = (
            opened.instances(image.id),
            dict(zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)),
        )
        for k, (left, top, right, bottom) in enumerate(found.box):
            row, own = rows[at], found.source[k] == Source.BASE_BOX
            embedding = np.array(row.pop("embedding"), np.float32)
            assert np.array_equal(embedding, found.embedding[k].astype(np.float32))
            has_noun = found.noun[k] >= 0
            assert row == {
                "image_id": image.id,
                "file_name": image.file_name,
                "x": left,
                "y": top,
                "w": right - left,
                "h": bottom - top,
                "source": "base" if own else "proposal",
                "score": found.score[k],
                "name": protocol.names[labels[found.annotation_id[k]]]
                if own
                else nouns[found.noun[k]]
                if has_noun
                else None,
                "noun_cosine": found.noun_cosine[k] if has_noun else None,
                "annotation_id": found.annotation_id[k] if own else None,
            }
            at += 1
    assert at == len(rows) == len(opened.row_images())
    assert {"base", "proposal"} == set(table["source"].to_pylist())
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), opened.dim)


def test_duckdb_reads_the_same(cache: Path, tmp_path: Path) -> None:
    table = _export(cache, tmp_path)
    found = duckdb.sql(f"select * from '{tmp_path / 'boxes.parquet'}'")
    assert found.columns == table.schema.names
    assert [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()] == table.to_pylist()
    (most,) = duckdb.sql(
        f"select max(list_cosine_similarity(embedding, embedding)) from '{tmp_path / 'boxes.parquet'}'"
    ).fetchall()
    assert most[0] == pytest.approx(1, abs=1e-5)


def test_row_groups_are_written_one_by_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole = _export(cache, tmp_path / "whole")
    monkeypatch.setattr(export, "GROUP_ROWS", 32)
    asked, read = [], FeatureCache.rows_between
    monkeypatch.setattr(
        FeatureCache, "rows_between", lambda self, a, b, **more: asked.append(b - a) or read(self, a, b, **more)
    )
    assert _export(cache, tmp_path).equals(whole)
    groups = pq.ParquetFile(tmp_path / "boxes.parquet").metadata
    sizes = [groups.row_group(k).num_rows for k in range(groups.num_row_groups)]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {32}
    assert max(asked) == 32


def test_images_that_cannot_be_read_have_no_embedding(
    extraction: Callable[..., Any], world: Path, kept: list[int], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(world, tmp_path / "world"))
    (copied / "train2017" / f"{kept[2]:012d}.jpg").unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied))
    table = _export(tmp_path / "cache", tmp_path)
    without = {
        row["image_id"] for row in table.select(["image_id", "embedding"]).to_pylist() if row["embedding"] is None
    }
    assert without == {kept[2]}


def test_a_set_of_base_boxes_alone(extraction: Callable[..., Any], tmp_path: Path) -> None:
    extract_clip(extraction(tmp_path / "cache", proposals=None, vocabulary=None, captions=None, features="plain"))
    table = _export(tmp_path / "cache", tmp_path, features="plain")
    assert set(table["source"].to_pylist()) == {"base"}
    assert set(table["noun_cosine"].to_pylist()) == {None}
    assert None not in table["name"].to_pylist()


def test_without_the_data_names_of_files_and_classes_are_null(copied_cache: Path, tmp_path: Path) -> None:
    file = copied_cache / "sets/default.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | {"made_from": {}})))
    lines = list[str]()
    table = _export(copied_cache, tmp_path, lines.append)
    assert set(table["file_name"].to_pylist()) == {None}
    assert {row["name"] for row in table.select(["name", "source"]).to_pylist() if row["source"] == "base"} == {None}
    assert any(line.startswith("note: there are no file names") and "--data" in line for line in lines)
    (tmp_path / "boxes.parquet").unlink()
    with pytest.raises(HdovdError, match="give --data and --protocol"):
        _export(copied_cache, tmp_path, protocol="ov-coco")
    assert not (tmp_path / "boxes.parquet").exists()


def test_bad_input(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HdovdError, match=r"ends in \.parquet"):
        export_parquet(ExportConfig(cache=cache, to=ExportForm.PARQUET, out=tmp_path / "boxes.csv"))
    with pytest.raises(HdovdError, match="no set of features named other"):
        _export(cache, tmp_path, features="other")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(HdovdError, match=r"pip install 'hdovd\[parquet\]'"):
        _export(cache, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_what_was_there(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 32)
    read = FeatureCache.rows_between

    def deadly(self: FeatureCache, start: int, stop: int, **more: bool) -> Any:
        if start >= 64:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, start, stop, **more)

    file = tmp_path / "boxes.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "rows_between", deadly)
        for content in (None, b"what was there"):
            if content is not None:
                file.write_bytes(content)
            process = multiprocessing.get_context("fork").Process(target=_export, args=(cache, tmp_path))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert (file.read_bytes() if file.exists() else None) == content
    assert len(_export(cache, tmp_path)) == len(FeatureCache(cache).row_images())
    assert [found.name for found in tmp_path.iterdir()] == ["boxes.parquet"]  # the half-written one is gone too


def test_the_command(cache: Path, world: Path, tmp_path: Path) -> None:
    words = [
        "cache",
        "export",
        str(cache),
        "--to",
        "parquet",
        "--out",
        str(tmp_path / "boxes.parquet"),
        "--data",
        str(world),
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'boxes.parquet'}: {len(FeatureCache(cache).row_images())} boxes" in done.output
