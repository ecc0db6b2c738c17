"""From a cache to tar shards and back: nothing is lost or added, killed exports go on, and extraction straight to
shards.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hdovd.cache import Catalog, Level
from hdovd.cache.tar_shards import TarShards
from hdovd.cli.main import app
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.extraction.config import ExtractConfig, Store
from hdovd.pipelines.extraction.export import ExportConfig, export_tars, import_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip

Extraction = Callable[..., ExtractConfig]


def _files(folder: Path) -> dict[str, bytes]:
    found = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {
        name: data
        for name, data in found.items()  # shards do not keep what the files of the pictures were
        if not name.startswith((".claims/", "runs/")) and "/pictures/" not in name
    }


def _same_files(one: Path, two: Path) -> None:
    a, b = _files(one), _files(two)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


def _members(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            found |= {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def broken(world: Path, extraction: Extraction, tmp_path_factory: pytest.TempPathFactory, kept: list[int]) -> Path:
    """A cache of small parts, in which two images could not be read, one of them gone."""
    folder = tmp_path_factory.mktemp("broken")
    copied = Path(shutil.copytree(world, folder / "world"))
    (copied / "train2017" / f"{kept[2]:012d}.jpg").unlink()
    (copied / "train2017" / f"{kept[7]:012d}.jpg").write_bytes(b"no picture")
    extract_clip(extraction(folder / "cache", data=copied, part_rows=16))
    return folder / "cache"


# --- there and back ---


@pytest.mark.parametrize("samples", [1, 5, 1000])
def test_round_trip_is_exact(cache: Path, tmp_path: Path, samples: int) -> None:
    export_tars(ExportConfig(cache=cache, out=tmp_path / "shards", samples=samples))
    features = import_tars(tmp_path / "shards", tmp_path / "back")
    assert features == Catalog(cache).sets()["default"]
    _same_files(cache, tmp_path / "back")


def test_round_trip_of_small_parts_and_failed_images_is_exact(broken: Path, kept: list[int], tmp_path: Path) -> None:
    assert len(Catalog(broken).products(Level.INSTANCE)[0].records()) > 10
    export_tars(ExportConfig(cache=broken, out=tmp_path / "shards", samples=4))
    import_tars(tmp_path / "shards", tmp_path / "back")
    _same_files(broken, tmp_path / "back")
    members = _members(tmp_path / "shards")
    for image, reason in ((kept[2], "no such file"), (kept[7], "no picture of a kind")):
        assert f"{image:012d}.jpg" not in members
        assert reason in json.loads(members[f"{image:012d}.json"])["failed"]
    assert f"{kept[3]:012d}.jpg" in members


def test_round_trip_of_a_named_set_without_proposals_is_exact(extraction: Extraction, tmp_path: Path) -> None:
    extract_clip(extraction(tmp_path / "cache", proposals=None, vocabulary=None, captions=None, features="plain"))
    with pytest.raises(HdovdError, match="no set of features named default; it has plain"):
        export_tars(ExportConfig(cache=tmp_path / "cache", out=tmp_path / "shards"))
    export_tars(ExportConfig(cache=tmp_path / "cache", out=tmp_path / "shards", features="plain"))
    import_tars(tmp_path / "shards", tmp_path / "back")
    _same_files(tmp_path / "cache", tmp_path / "back")


def test_shards_hold_the_files_and_base_annotations_alone(
    cache: Path, world: Path, kept: list[int], tmp_path: Path
) -> None:
    export_tars(ExportConfig(cache=cache, out=tmp_path / "shards", samples=7))
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    expected: dict[int, list[dict[str, Any]]] = {image: [] for image in kept}
    for a in tree["annotations"]:
        if names[a["category_id"]] in BASE:
            expected[a["image_id"]].append({"id": a["id"], "category": names[a["category_id"]], "bbox": a["bbox"]})
    members = _members(tmp_path / "shards")
    assert {name.partition(".")[0] for name in members} == {f"{image:012d}" for image in kept}
    for image in kept:
        file = world / "train2017" / f"{image:012d}.jpg"
        assert members[f"{image:012d}.jpg"] == file.read_bytes()
        about = json.loads(members[f"{image:012d}.json"])
        assert about["annotations"] == expected[image]
        assert about["file_name"] == file.name
    assert (
        len([a for a in tree["annotations"] if names[a["category_id"]] not in BASE]) > 5
    )  # there was something to leave out


def test_import_leaves_what_is_there_and_goes_on(cache: Path, tmp_path: Path) -> None:
    export_tars(ExportConfig(cache=cache, out=tmp_path / "shards", samples=9))
    back = Path(shutil.copytree(cache, tmp_path / "back"))
    product = Catalog(back).products(Level.INSTANCE)[0]
    (back / product.record_name(0)).unlink()  # as a killed import leaves it
    shutil.rmtree(back / "image")
    (back / "image").mkdir()
    shutil.copy(cache / "image" / "zarr.json", back / "image")
    (back / "sets" / "default.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in back.rglob("*") if file.is_file()}
    import_tars(tmp_path / "shards", back)
    _same_files(cache, back)
    after = {file: file.stat().st_mtime_ns for file in back.rglob("*") if file.is_file()}
    written = {file.relative_to(back).parts[0] for file, when in after.items() if before.get(file) != when}
    assert written == {"image", "instance", "named", "sets"}


def test_import_refuses_shards_that_are_damaged_or_few(cache: Path, tmp_path: Path) -> None:
    export_tars(ExportConfig(cache=cache, out=tmp_path / "shards", samples=9))
    with pytest.raises(HdovdError, match=r"names 1 of 3 shards"):
        import_tars(tmp_path / "shards" / "000001.tar", tmp_path / "back")
    data = bytearray((tmp_path / "shards" / "000001.tar").read_bytes())
    data[-20000] ^= 1
    (tmp_path / "shards" / "000001.tar").write_bytes(data)
    with pytest.raises(HdovdError, match=r"000001\.tar"):
        import_tars(tmp_path / "shards", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_rows_changed_by_somebody_are_refused(cache: Path, tmp_path: Path) -> None:
    """Shards with new sums beside them are whole, but they are not what was exported."""
    import hashlib

    export_tars(ExportConfig(cache=cache, out=tmp_path / "shards"))
    file = tmp_path / "shards" / "000000.tar"
    with tarfile.open(file) as tar:
        at = tar.getmember("000000000003.instance.npy").offset_data + 128
    data = bytearray(file.read_bytes())
    data[at : at + 48], data[at + 48 : at + 96] = data[at + 48 : at + 96], data[at : at + 48]  # two rows
    file.write_bytes(data)
    file.with_suffix(".json").write_text(json.dumps({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(HdovdError, match=r"embedding/c/0/0 of instance \w+ is not what was exported"):
        import_tars(tmp_path / "shards", tmp_path / "back")


# --- refusals ---


def test_other_data_are_refused_naming_what_differs(cache: Path, copied_world: Path, tmp_path: Path) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    next(a for a in tree["annotations"] if tree["categories"][a["category_id"] - 1]["name"] in BASE)["bbox"][2] -= 1
    file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"boxes level.*does not fit this data:\n.*base_boxes\.hash"):
        export_tars(ExportConfig(cache=cache, out=tmp_path / "shards", data=DataPaths(copied_world)))
    assert not (tmp_path / "shards").exists()


def test_picture_that_is_gone_is_named_and_nothing_half_written_stays(
    cache: Path, copied_world: Path, kept: list[int], tmp_path: Path
) -> None:
    name = f"{kept[12]:012d}.jpg"
    (copied_world / "train2017" / name).rename(tmp_path / name)
    config = ExportConfig(cache=cache, out=tmp_path / "shards", data=DataPaths(copied_world), samples=5)
    with pytest.raises(HdovdError, match=rf"image {kept[12]}: .*{name}"):
        export_tars(config)
    assert sorted(file.name for file in (tmp_path / "shards").glob("*.tar")) == ["000000.tar", "000001.tar"]
    (tmp_path / name).rename(copied_world / "train2017" / name)
    export_tars(config)
    export_tars(ExportConfig(cache=cache, out=tmp_path / "again", samples=5))
    _same_files(tmp_path / "shards", tmp_path / "again")


def test_set_of_unknown_origin_needs_data_and_protocol(copied_cache: Path, world: Path, tmp_path: Path) -> None:
    catalog = Catalog(copied_cache)
    catalog.write_set("default", replace(catalog.sets()["default"], made_from={}))
    with pytest.raises(HdovdError, match="give --data and --protocol"):
        export_tars(ExportConfig(cache=copied_cache, out=tmp_path / "shards"))
    config = ExportConfig(
        cache=copied_cache, out=tmp_path / "shards", data=DataPaths(world), protocol=str(world / "protocol.toml")
    )
    assert export_tars(config).images == 23


# --- killed ---


def test_killed_export_goes_on_and_ends_the_same(
    cache: Path, copied_world: Path, kept: list[int], tmp_path: Path
) -> None:
    out, config = (
        tmp_path / "shards",
        ExportConfig(cache=cache, out=tmp_path / "shards", data=DataPaths(copied_world), samples=2),
    )
    picture = copied_world / "train2017" / f"{kept[7]:012d}.jpg"
    picture.rename(tmp_path / "picture.jpg")
    os.mkfifo(picture)  # the export waits here, in its fourth shard, until it is killed
    process = multiprocessing.get_context("fork").Process(target=export_tars, args=(config,))
    process.start()
    while process.is_alive() and not (out / "000002.json").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    done = {file.name: file.stat().st_mtime_ns for file in out.glob("0*")}
    assert sorted(done) == ["000000.json", "000000.tar", "000001.json", "000001.tar", "000002.json", "000002.tar"]
    picture.unlink()
    (tmp_path / "picture.jpg").rename(picture)
    (out / f".partial-{socket.gethostname().replace('-', '_')}-{process.pid}-1").write_bytes(b"half a shard")
    export_tars(config)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    export_tars(replace(config, out=tmp_path / "unbroken"))
    _same_files(out, tmp_path / "unbroken")


# --- extract-clip --store webdataset ---


def test_extraction_to_shards_leaves_shards_alone(extraction: Extraction, cache: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(tmp_path / "shards", store=Store.WEBDATASET))
    assert report.whole
    assert report.new_rows[Level.IMAGE] == 23
    export_tars(ExportConfig(cache=cache, out=tmp_path / "exported"))
    _same_files(tmp_path / "shards", tmp_path / "exported")
    assert any("verified" in line for line in lines)
    assert not (tmp_path / "shards" / ".zarr").exists()


class _NeverAsked:
    """A teacher that may be known by its identity alone, or be asked for the texts of `names` too."""

    def __init__(self, teacher: Any, names: tuple[str, ...] = ()) -> None:
        self._teacher, self._names = teacher, names

    def __getattr__(self, name: str) -> Any:
        if name == "embed_names" and self._names:
            return self._embed
        if name in ("embed_images", "embed_names"):
            raise AssertionError(name)
        return getattr(self._teacher, name)

    def _embed(self, names: list[str], templates: Any) -> Any:
        assert set(names) <= set(self._names)
        return self._teacher.embed_names(names, templates)


@pytest.fixture
def teacher(clip: str) -> Any:
    from hdovd.pipelines.teachers.openclip import load_clip

    return load_clip(clip, None, device="cpu")


def test_second_extraction_to_shards_is_a_hit(extraction: Extraction, tmp_path: Path, teacher: Any) -> None:
    folder, lines = tmp_path / "shards", list[str]()
    extract_clip(extraction(folder, store=Store.WEBDATASET))
    (folder / ".zarr" / "boxes").mkdir(parents=True)  # as a kill in the middle of deleting leaves it
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}
    with lines_to(lines.append):
        report = extract_clip(extraction(folder, store=Store.WEBDATASET), _NeverAsked(teacher))
    assert set(report.levels.values()) == {"hit"}
    assert not any(report.new_rows.values())
    assert any("nothing to extract" in line for line in lines)
    assert sum(line.startswith("skipped 1: image with proposals") for line in lines) == 1
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()} == before
    assert not (folder / ".zarr").exists()


def test_other_inputs_are_refused_before_anything_is_extracted(
    extraction: Extraction, tmp_path: Path, teacher: Any
) -> None:
    folder = tmp_path / "shards"
    extract_clip(extraction(folder, store=Store.WEBDATASET))
    before = _files(folder)
    with pytest.raises(HdovdError, match=r"made from something else(.|\n)*templates differs"):
        extract_clip(extraction(folder, store=Store.WEBDATASET, templates=("a {}",)), _NeverAsked(teacher))
    with pytest.raises(HdovdError, match="not other"):
        extract_clip(extraction(folder, store=Store.WEBDATASET, features="other"), _NeverAsked(teacher))
    assert _files(folder) == before


@pytest.mark.parametrize("state", ["extracting", "exporting", "verifying"])
def test_extraction_to_shards_goes_on_wherever_it_was_killed(
    extraction: Extraction, cache: Path, tmp_path: Path, state: str, teacher: Any
) -> None:
    folder = tmp_path / "shards"
    extract_clip(extraction(folder / ".zarr"))
    if state == "extracting":
        (folder / ".zarr" / "sets" / "default.json").unlink()
    else:
        export_tars(ExportConfig(cache=folder / ".zarr", out=folder))
        if state == "exporting":
            (folder / "000000.json").unlink()
        else:  # the shard was damaged on its way, which must not pass for done
            data = bytearray((folder / "000000.tar").read_bytes())
            data[5000] ^= 1
            (folder / "000000.tar").write_bytes(data)
            with pytest.raises(
                HdovdError, match=r"000000\.tar: sample \d+ is damaged(.|\n)*run the same command again"
            ):
                extract_clip(extraction(folder, store=Store.WEBDATASET), _NeverAsked(teacher))
            assert (folder / ".zarr" / "zarr.json").exists()
    asked = ("object",) if state == "extracting" else ()  # the set, which keeps that text, is gone
    extract_clip(extraction(folder, store=Store.WEBDATASET), _NeverAsked(teacher, asked))
    export_tars(ExportConfig(cache=cache, out=tmp_path / "exported"))
    _same_files(folder, tmp_path / "exported")


def test_dry_run_and_zarr_caches_are_left_alone(extraction: Extraction, copied_cache: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with lines_to(lines.append):
        extract_clip(extraction(tmp_path / "shards", store=Store.WEBDATASET, dry_run=True))
    assert not (tmp_path / "shards").exists()
    assert any("dry run" in line for line in lines)
    with pytest.raises(HdovdError, match="is a Zarr cache"):
        extract_clip(extraction(copied_cache, store=Store.WEBDATASET))
    with pytest.raises(HdovdError, match="--retry-failed"):
        _retry_failed(extraction, tmp_path)


def _retry_failed(extraction: Extraction, tmp_path: Path) -> None:
    world = Path(shutil.copytree(extraction(tmp_path).data.root or Path(), tmp_path / "world"))
    (world / "train2017" / "000000000003.jpg").unlink()
    extract_clip(extraction(tmp_path / "failed", data=world, store=Store.WEBDATASET))
    assert list(TarShards(tmp_path / "failed").failed()) == [3]
    extract_clip(extraction(tmp_path / "failed", data=world, store=Store.WEBDATASET, retry_failed=True))


# --- commands ---


def test_commands(cache: Path, world: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        found = CliRunner().invoke(app, ["cache", *map(str, words)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    said = run("export", cache, "--to", "webdataset", "--out", tmp_path / "shards", "--data", world, "--samples", 10)
    assert "23 images in 3 tar shards" in said
    assert "hdovd train --cache" in said
    run("import", tmp_path / "shards", "--format", "webdataset", "--cache", tmp_path / "back")
    _same_files(cache, tmp_path / "back")
