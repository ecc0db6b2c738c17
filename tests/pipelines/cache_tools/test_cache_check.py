"""`check_cache`: every damage is found and named; what repair marks as missing, the same extraction makes again, to the
byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import TABLES, Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.cache.verify import Checked, Finding
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.listing import find_garbage
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.export import export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.source import ExportConfig
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

PART_ROWS, BATCH = 64, 48  # neither is the default
Damage = Callable[[Path], tuple[str, int | str | None] | None]


@pytest.fixture(scope="module")
def teacher(clip: str) -> ClipTeacher:
    return load_clip(clip, None, device="cpu")


@pytest.fixture(scope="module")
def parted(
    extraction: Callable[..., ExtractConfig], teacher: ClipTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The micro world's cache in several parts a level."""
    folder = tmp_path_factory.mktemp("parted") / "cache"
    extract_clip(extraction(folder, part_rows=PART_ROWS, batch_size=BATCH), teacher)
    return folder


@pytest.fixture
def copied(parted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parted, tmp_path / "the cache"))


@pytest.fixture
def check(teacher: ClipTeacher) -> Callable[..., Checked]:
    def run(cache: Path, *, log: Callable[[str], None] = lambda _: None, **changes: Any) -> Checked:
        with lines_to(log):
            return check_cache(CheckConfig(cache=cache, **changes), teacher)

    return run


@pytest.fixture
def mended(
    check: Callable[..., Checked], extraction: Callable[..., ExtractConfig], teacher: ClipTeacher
) -> Callable[..., list[Finding]]:
    """Both steps, repair and then the same extraction; and what is wrong afterwards."""

    def run(
        cache: Path, *, log: Callable[[str], None] = lambda _: None, sample: int = 0, **settings: Any
    ) -> list[Finding]:
        check(cache, repair=True, log=log, sample=sample)
        extract_clip(extraction(cache, part_rows=PART_ROWS, batch_size=BATCH, **settings), teacher)
        return check(cache, sample=sample).findings

    return run


def _product(cache: Path, level: Level) -> Path:
    (found,) = [p for p in (cache / level).iterdir() if p.is_dir()]
    return found


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x41
    file.write_bytes(data)


def _reseal(product: Path, part: int, name: str) -> None:
    """Write an object's checksum into its record anew, as if it had been so from the beginning."""
    record = product / "parts" / f"{part:06d}.json"
    tree = json.loads(record.read_text())
    tree["objects"][name]["sha256"] = hashlib.sha256((product / name).read_bytes()).hexdigest()
    record.write_text(json.dumps(tree, indent=1))


def _swap_rows(cache: Path, level: Level = Level.INSTANCE, part: int = 1, rows: tuple[int, int] = (3, 41)) -> None:
    product, name = _product(cache, level), f"embedding/c/{part}/0"
    data = np.fromfile(product / name, np.uint8)
    table = data[: len(data) // 48 * 48].reshape(-1, 48)  # the shard's index is shorter than a row
    table[list(rows)] = table[list(rows)[::-1]]
    data.tofile(product / name)
    _reseal(product, part, name)


# What a damage does, and which (file, part) names it.


def _in_embedding(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.INSTANCE) / "embedding/c/2/0", 100)
    return "embedding/c/2/0", 2


def _in_index(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.IMAGE) / "embedding/c/1/0", -9)
    return "embedding/c/1/0", 1


def _in_labels(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.PSEUDO_LABEL) / "noun_cosine/c/3", 7)
    return "noun_cosine/c/3", 3


def _in_table(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.BOXES) / "box/c/0/0", 33)
    return "box/c/0/0", TABLES


def _in_array_metadata(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.NOUN) / "embedding/zarr.json", 0)
    return "embedding/zarr.json", TABLES


def _in_metadata(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.INSTANCE) / "zarr.json", 0)  # no JSON any more
    return "zarr.json", TABLES


def _in_key_inputs(cache: Path) -> tuple[str, int | str | None]:
    file = _product(cache, Level.IMAGE) / "zarr.json"
    file.write_text(file.read_text().replace('"bicubic"', '"bilinear"'))
    return "zarr.json", TABLES


def _in_batch_size(cache: Path) -> tuple[str, int | str | None]:
    file = _product(cache, Level.IMAGE) / "zarr.json"
    file.write_text(file.read_text().replace(f'"batch_size": {BATCH}', '"batch_size": 47'))
    return "zarr.json", TABLES


def _in_record(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.INSTANCE) / "parts/000001.json", 0)
    return "parts/000001.json", 1


def _in_table_record(cache: Path) -> tuple[str, int | str | None]:
    _flip(_product(cache, Level.IMAGE) / "parts/tables.json", 30)
    return "parts/tables.json", TABLES


def _no_record(cache: Path) -> tuple[str, int | str | None]:
    (_product(cache, Level.PSEUDO_LABEL) / "parts/000000.json").unlink()
    return "parts/000000.json", 0


def _truncated(cache: Path) -> tuple[str, int | str | None]:
    file = _product(cache, Level.INSTANCE) / "embedding/c/0/0"
    file.write_bytes(file.read_bytes()[:-100])
    return "embedding/c/0/0", 0


def _deleted(cache: Path) -> tuple[str, int | str | None]:
    (_product(cache, Level.INSTANCE) / "embedding/c/3/0").unlink()
    return "embedding/c/3/0", 3


def _extra(cache: Path) -> tuple[str, int | str | None]:
    (_product(cache, Level.INSTANCE) / "embedding/c/9").mkdir()
    (_product(cache, Level.INSTANCE) / "embedding/c/9/0").write_bytes(b"x")
    return "embedding/c/9/0", None


def _group(cache: Path) -> tuple[str, int | str | None]:
    (cache / "instance/zarr.json").write_text("{}")
    return "instance/zarr.json", None


def _root(cache: Path) -> tuple[str, int | str | None]:
    _flip(cache / "zarr.json", 0)
    return "zarr.json", None


DAMAGES = [
    _in_embedding,
    _in_index,
    _in_labels,
    _in_table,
    _in_array_metadata,
    _in_metadata,
    _in_key_inputs,
    _in_batch_size,
    _in_record,
    _in_table_record,
    _no_record,
    _truncated,
    _deleted,
    _extra,
    _group,
    _root,
]


@pytest.fixture
def unchanged(contents: Callable[[Path], dict[str, str]]) -> Callable[[Path, Path], list[str]]:
    """The files of a cache that differ from another's in content, or are in one alone."""

    def compare(cache: Path, other: Path) -> list[str]:
        a, b = contents(cache), contents(other)
        return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))

    return compare


def _times(cache: Path) -> dict[str, int]:
    return {str(file.relative_to(cache)): file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}


def test_a_sound_cache_has_no_findings(
    copied: Path, check: Callable[..., Checked], untouched: Callable[[Path], Any]
) -> None:
    lines: list[str] = []
    with untouched(copied):
        report = check(copied, sample=1_000, log=lines.append)
    assert report.findings == []
    assert (report.products, report.unfinished) == (6, [])
    assert report.parts > 15
    assert lines[-1] == "nothing is wrong"
    trees = {
        level: json.loads((_product(copied, level) / "zarr.json").read_text())
        for level in (Level.IMAGE, Level.INSTANCE)
    }
    rows = {level: tree["attributes"]["rows"] for level, tree in trees.items()}
    assert {level: len(found) for (level, _), found in report.sampled.items()} == rows
    assert all(found.min() > 0.999 for found in report.sampled.values())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_damage_is_named_and_made_again_to_the_byte(
    copied: Path,
    parted: Path,
    damage: Callable[[Path], tuple[str, int | str | None]],
    mended: Callable[..., list[Finding]],
    unchanged: Callable[[Path, Path], list[str]],
) -> None:
    name, part = damage(copied)
    before, lines = _times(copied), list[str]()
    assert mended(copied, log=lines.append) == []
    (line,) = lines[: next(number for number, line in enumerate(lines) if line.startswith("checked "))]
    assert f"{name}: " in line
    assert (f", part {part}, " in line) == isinstance(part, int)
    assert (", tables, " in line) == (part == TABLES)
    assert re.search(": expected .*, found ", line)
    assert unchanged(copied, parted) == []
    written = {file for file, time in _times(copied).items() if before.get(file) != time}
    if isinstance(part, int):  # the record and the objects of that part of that level
        level = line.split()[0]
        own = rf"{level}/\w+/(parts/{part:06d}\.json|pictures/{part:06d}\.npz|\w+/c/{part}(/0)?)"
        assert all(re.fullmatch(own, file) for file in written), written
    else:
        assert not [file for file in written if re.search(r"/parts/\d|/embedding/c/|/noun\w*/c/", file)]
    if part is not None:
        assert any(re.search(r"^1 object marked as missing; now run", line) for line in lines)
        assert lines[-1].startswith(f"  hdovd extract-clip --cache '{copied}' --data ")


def test_what_is_marked_is_missing_until_it_is_extracted(copied: Path, check: Callable[..., Checked]) -> None:
    _in_embedding(copied)
    assert len(check(copied, repair=True).findings) == 1
    (finding,) = check(copied).findings
    assert finding.place.endswith("/parts/000002.json")
    assert (finding.part, finding.found) == (2, "no such object")


def test_several_damages_at_once(
    copied: Path, parted: Path, mended: Callable[..., list[Finding]], unchanged: Callable[[Path, Path], list[str]]
) -> None:
    lines: list[str] = []
    kinds = (_in_index, _in_labels, _in_table, _in_metadata, _in_record, _no_record, _deleted, _extra, _group)
    damaged = [damage(copied) for damage in kinds]
    (hidden,) = mended(copied, log=lines.append)  # an object too many, which only sound metadata tell
    assert hidden.place.endswith("embedding/c/9/0")
    assert mended(copied, log=lines.append) == []
    assert all(any(name in line for line in lines) for name, _ in damaged)
    assert unchanged(copied, parted) == []


def test_all_metadata_lost(
    copied: Path,
    parted: Path,
    check: Callable[..., Checked],
    mended: Callable[..., list[Finding]],
    unchanged: Callable[[Path, Path], list[str]],
) -> None:
    for level in Level:
        (_product(copied, level) / "zarr.json").unlink()
    before = _times(copied)
    assert {(f.product and f.product[0], f.part) for f in check(copied).findings} == {
        (level, TABLES) for level in Level
    }
    assert mended(copied) == []
    assert unchanged(copied, parted) == []
    assert {Path(file).name for file, time in _times(copied).items() if before.get(file) != time} == {"zarr.json"}


def test_parts_of_lost_metadata_are_kept_only_if_these_were_the_same(
    copied: Path,
    mended: Callable[..., list[Finding]],
    extraction: Callable[..., ExtractConfig],
    teacher: ClipTeacher,
    check: Callable[..., Checked],
) -> None:
    """Parts of another size would be taken for whole ones."""
    product = _product(copied, Level.INSTANCE)
    (product / "zarr.json").unlink()
    extract_clip(extraction(copied, part_rows=2 * PART_ROWS, batch_size=BATCH), teacher)
    assert {f.expected for f in check(copied).findings} == {"nothing there"}  # what is left of the smaller parts
    assert {file.name for file in (product / "parts").iterdir()} == {"000000.json", "000001.json", "tables.json"}
    assert mended(copied) == []


# --- rows that were exchanged ---


@pytest.mark.parametrize("level", [Level.INSTANCE, Level.IMAGE])
def test_only_a_sample_finds_rows_swapped_under_a_new_checksum(
    copied: Path,
    parted: Path,
    level: Level,
    check: Callable[..., Checked],
    mended: Callable[..., list[Finding]],
    unchanged: Callable[[Path, Path], list[str]],
) -> None:
    _swap_rows(copied, level, *((1, (3, 41)) if level is Level.INSTANCE else (2, (0, 3))))
    first, second = (PART_ROWS + 3, PART_ROWS + 41) if level is Level.INSTANCE else (8, 11)
    assert check(copied).findings == []
    (finding,) = check(copied, sample=1_000).findings
    assert (finding.product and finding.product[0], finding.part) == (
        level,
        first // (PART_ROWS if level is Level.INSTANCE else 4),
    )
    assert finding.where.startswith(f"rows {first}, {second} (image ")
    assert "0.99" in finding.expected
    assert mended(copied, sample=1_000) == []
    assert unchanged(copied, parted) == []


def test_swapped_rows_are_found_by_their_checksum(copied: Path, check: Callable[..., Checked]) -> None:
    record = _product(copied, Level.INSTANCE) / "parts/000001.json"
    before = record.read_bytes()
    _swap_rows(copied)
    record.write_bytes(before)
    (finding,) = check(copied).findings
    assert finding.part == 1
    assert finding.expected.startswith("sha256 ")


def test_sample_takes_other_rows_with_another_seed_and_the_same_with_the_same(
    copied: Path, check: Callable[..., Checked]
) -> None:
    """Many rows of one part are exchanged: some seeds meet some of them, each seed always the same ones."""
    for row in range(0, 60, 2):
        _swap_rows(copied, rows=(row, row + 1))
    found = {seed: [f.where for f in check(copied, sample=12, seed=seed).findings] for seed in (1, 2, 3)}
    assert len(set(map(str, found.values()))) > 1
    assert [f.where for f in check(copied, sample=12, seed=2).findings] == found[2]


def test_sample_leaves_out_what_is_known_to_be_damaged(copied: Path, check: Callable[..., Checked]) -> None:
    _truncated(copied)
    _in_index(copied)
    report = check(copied, sample=1_000)
    assert len(report.findings) == 2
    rows = {
        level: json.loads((_product(copied, level) / "zarr.json").read_text())["attributes"]["rows"]
        for level, _ in report.sampled
    }
    assert {level: rows[level] - len(found) for (level, _), found in report.sampled.items()} == {
        Level.INSTANCE: PART_ROWS,
        Level.IMAGE: 4,
    }
    _in_table(copied)
    _in_metadata(copied)
    assert {level for level, _ in check(copied, sample=5).sampled} == {Level.IMAGE}


def test_sample_refuses_another_clip(copied: Path, save_clip: Callable[..., str], tmp_path: Path) -> None:
    other = save_clip(tmp_path / "other clip", seed=1)
    with pytest.raises(
        HdovdError, match=r"another CLIP:\s+clip\.weights_sha256 differs: the cache has .*, the CLIP named has"
    ):
        check_cache(CheckConfig(cache=copied, sample=3, changes={"clip": other, "device": "cpu"}))


def test_sample_says_which_pictures_it_could_not_read(
    copied: Path, copied_world: Path, check: Callable[..., Checked]
) -> None:
    for number, file in enumerate(sorted((copied_world / "train2017").iterdir())):
        if number % 2:
            file.write_bytes(b"")
    lines: list[str] = []
    report = check(copied, sample=1_000, changes={"data": DataPaths(copied_world)}, log=lines.append)
    assert [finding.found for finding in report.findings] == ["11 of another content, which extract-clip embeds again"]
    assert any("images could not be encoded again" in line and "no picture of a kind" in line for line in lines)
    assert all(len(found) > 0 for found in report.sampled.values())
    shutil.rmtree(copied_world / "train2017")
    (copied_world / "train2017").mkdir()
    with pytest.raises(HdovdError, match="none of 23 rows could be encoded again"):
        check(copied, sample=1_000, changes={"data": DataPaths(copied_world)})


# --- what repair needs, and what it leaves alone ---


def test_a_damaged_set_is_written_again(
    copied: Path,
    parted: Path,
    check: Callable[..., Checked],
    mended: Callable[..., list[Finding]],
    unchanged: Callable[[Path, Path], list[str]],
) -> None:
    file, lines = copied / "sets/default.json", list[str]()
    file.write_bytes(file.read_bytes()[:-20])
    _in_embedding(copied)
    assert check(copied).findings[0].place == "sets/default.json"
    with pytest.raises(HdovdError, match=r"default\.json is damaged"):
        FeatureCache(copied)
    assert mended(copied, log=lines.append) == []
    assert lines[-1] == "  the hdovd extract-clip command of set default"
    assert unchanged(copied, parted) == []


def test_rows_that_came_from_another_product_are_made_again_to_the_byte(
    copied: Path,
    proposals: Path,
    extraction: Callable[..., ExtractConfig],
    teacher: ClipTeacher,
    tmp_path: Path,
    check: Callable[..., Checked],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    tree = json.loads(proposals.read_text())
    more = tmp_path / "more.json"
    more.write_text(json.dumps([*tree, {**tree[0], "bbox": [3, 3, 20, 20]}]))
    first = _product(copied, Level.INSTANCE)
    extract_clip(extraction(copied, proposals=more, part_rows=PART_ROWS, features="more"), teacher)
    (second,) = [p for p in (copied / "instance").iterdir() if p.is_dir() and p != first]
    before = contents(copied)
    for product, part in ((first, 0), (second, 0), (second, 2)):
        _flip(product / f"embedding/c/{part}/0", 50)
    assert {(f.product and f.product[1], f.part) for f in check(copied).findings} == {
        (first.name, 0),
        (second.name, 0),
        (second.name, 2),
    }
    check(copied, repair=True)
    for changes in ({}, {"proposals": more, "features": "more"}):
        extract_clip(extraction(copied, part_rows=PART_ROWS, **changes), teacher)
    assert check(copied).findings == []
    assert contents(copied) == before


def test_repair_of_one_set_leaves_others_alone(
    copied: Path, extraction: Callable[..., ExtractConfig], teacher: ClipTeacher, check: Callable[..., Checked]
) -> None:
    extract_clip(extraction(copied, templates=("{} on a table",), part_rows=PART_ROWS, features="other"), teacher)
    sets = {name: json.loads((copied / f"sets/{name}.json").read_text())["levels"] for name in ("default", "other")}
    for levels in sets.values():
        _flip(copied / "class" / levels["class"] / "embedding/c/0/0", 3)
    assert len(check(copied).findings) == 2
    assert len(check(copied, features="other").findings) == 1
    check(copied, repair=True, features="other")
    extract_clip(extraction(copied, templates=("{} on a table",), part_rows=PART_ROWS, features="other"), teacher)
    (left,) = check(copied).findings
    assert left.product == (Level.CLASS, sets["default"]["class"])
    with pytest.raises(HdovdError, match="no set of features named third; it has default, other"):
        check(copied, features="third")


def test_unfinished_products_are_no_fault(
    copied: Path,
    parted: Path,
    extraction: Callable[..., ExtractConfig],
    teacher: ClipTeacher,
    check: Callable[..., Checked],
    unchanged: Callable[[Path, Path], list[str]],
) -> None:
    """As a killed extraction leaves them; a damaged part among the finished ones is dropped by repair, and the
    extraction goes on.
    """
    Catalog(copied).delete_set("default")
    product = _product(copied, Level.INSTANCE)
    (product / "parts/000003.json").unlink()
    (product / "parts/000000.json").unlink()
    (product / "embedding/c/0/0").unlink()
    report = check(copied)
    assert report.findings == []
    assert report.unfinished == [f"instance {product.name[:12]}: 2/4 parts"]
    _in_embedding(copied)
    assert [f.part for f in check(copied).findings] == [2]
    check(copied, repair=True)
    assert check(copied).findings == []
    extract_clip(extraction(copied, part_rows=PART_ROWS), teacher)
    assert unchanged(copied, parted) == []


def test_metadata_that_no_set_can_make_again(copied: Path, check: Callable[..., Checked]) -> None:
    Catalog(copied).delete_set("default")
    _in_metadata(copied)
    lines: list[str] = []
    check(copied, repair=True, log=lines.append)
    assert lines[-1] == "1 object marked as missing; no set uses them: hdovd cache gc deletes what nothing uses"
    assert "instance" in {entry.level for entry in find_garbage(Catalog(copied)).unused}


def test_imported_sets_are_imported_again(copied: Path, check: Callable[..., Checked]) -> None:
    catalog = Catalog(copied)
    catalog.write_set("default", replace(catalog.sets()["default"], made_from={}))
    _in_embedding(copied)
    lines: list[str] = []
    check(copied, repair=True, log=lines.append)
    assert lines[-1] == "  the hdovd cache import command of set default"


def test_what_is_no_cache_is_refused(tmp_path: Path, check: Callable[..., Checked], copied: Path) -> None:
    with pytest.raises(HdovdError, match="no feature cache"):
        check(tmp_path / "nothing")
    file = copied / "zarr.json"
    file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(HdovdError, match="newer hdovd"):
        check(copied, repair=True)


def test_shards_are_checked_one_by_one(parted: Path, tmp_path: Path) -> None:
    """All that is wrong is named, and what is sound is said to be so."""
    export_tars(ExportConfig(cache=parted, out=tmp_path / "shards", samples=6))
    said: list[str] = []
    with lines_to(said.append):
        assert check_cache(CheckConfig(cache=tmp_path / "shards")).findings == []
    assert said[-2:] == ["checked 4 tar shards of 23 images: every file, by checksum and by value", "nothing is wrong"]
    for number, at in ((1, 700), (3, 5000)):
        file = tmp_path / "shards" / f"{number:06d}.tar"
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
    (tmp_path / "shards" / "000002.json").unlink()
    with lines_to(said.append):
        found = check_cache(CheckConfig(cache=tmp_path / "shards")).findings
    assert [finding.place for finding in found] == ["000001.tar", "000002.tar", "000003.tar"]
    with (
        pytest.raises(HdovdError, match=r"is of tar shards: --sample and --repair need the Zarr cache"),
        lines_to(said.append),
    ):
        check_cache(CheckConfig(cache=tmp_path / "shards", repair=True))
