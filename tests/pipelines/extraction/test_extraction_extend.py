"""Extending: what a cache has of an extraction with other proposals or images is copied, and the rest computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from hdovd.cache import Catalog, Level, store
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import ROW_ARRAYS
from hdovd.cache.store import open_folder
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.engine import Unit
from hdovd.pipelines.extraction.extract_clip import ExtractReport, extract_clip, prepare

Config = Callable[..., ExtractConfig]
BOXES, INSTANCE, IMAGE, CLASS, NOUN, PSEUDO_LABEL = Level


def _decisions(report: ExtractReport) -> dict[Level, str]:
    """Of the levels that were no hit."""
    return {level: decision for level, decision in report.levels.items() if decision != "hit"}


def _stored(cache: Path, level: Level, name: str = "embedding", features: str = "default") -> np.ndarray:
    product: Any = zarr.open_group(cache / level / FeatureCache(cache, features).key(level), mode="r")
    return np.asarray(product[name][:])


def _edit(world: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def _keep_images(wanted: Callable[[int], bool]) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        tree["images"] = [i for i in tree["images"] if wanted(i["id"])]
        tree["annotations"] = [a for a in tree["annotations"] if wanted(a["image_id"])]

    return change


def test_a_cache_is_extended_in_its_own_precision(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    """Chosen by auto, whatever suits this device; also before the set has its name, and under another one."""
    root, lines = tmp_path / "cache", list[str]()
    fewer = extraction(root, data=copied_world, precision=Precision.BF16)
    extract_clip(fewer)
    _edit(copied_world, _keep_images(lambda image_id: image_id % 2 == 0))
    auto = replace(fewer, precision=Precision.AUTO)
    for config in (auto, replace(auto, features="other")):
        with lines_to(lines.append):
            decisions = extract_clip(config).levels
        assert decisions[CLASS] == decisions[NOUN] == "hit"
        assert Catalog(root).sets()[config.features].made_from["precision"] == "bf16"
    (root / "sets" / "default.json").unlink()
    with lines_to(lines.append):
        assert set(extract_clip(auto).levels.values()) == {"hit"}
    assert sum(line.startswith("precision: bf16, the cache's own") for line in lines) == 3


def test_another_precision_than_the_caches_says_what_it_costs(copied_cache: Path, extraction: Config) -> None:
    lines = list[str]()
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache, precision=Precision.BF16, dry_run=True))
    assert any(
        "--precision bf16: the cache's embeddings of this CLIP are fp32" in line and "made anew" in line
        for line in lines
    )
    lines.clear()
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache, precision=Precision.FP32, dry_run=True))
    assert not any("precision:" in line or "--precision" in line for line in lines)


def _write_proposals(file: Path, entries: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps(entries))
    return file


def _assert_equals_fresh(cache: Path, features: str, config: ExtractConfig) -> None:
    """All rows are those of an extraction into an empty folder with parts of that size, exactly: what is reused is
    copied, and on one kind of processor the rest does not depend on its batch.
    """
    extract_clip(config)
    for level in Level:
        for name in ("box", "source", "score", "annotation_id") if level is BOXES else ROW_ARRAYS[level]:
            np.testing.assert_array_equal(
                _stored(cache, level, name, features), _stored(Path(config.cache), level, name)
            )


def test_more_proposals_extend(
    copied_cache: Path, tmp_path: Path, proposals: Path, extraction: Config, counting: Any
) -> None:
    """In image 2, which had none, and in image 5, before, between and after its own, by their scores."""
    new = [
        {"image_id": image_id, "bbox": [3 * k + 1.5, 4, 30, 20], "score": score}
        for k, (image_id, score) in enumerate([(2, 0.5), (2, 0.9), (5, 1.0), (5, 0.5), (5, 0.0)])
    ]
    more = _write_proposals(tmp_path / "more.json", json.loads(proposals.read_text()) + new)
    report = extract_clip(extraction(copied_cache, proposals=more, features="more"), counting)
    assert _decisions(report) == {BOXES: "extract", INSTANCE: "extend", PSEUDO_LABEL: "extract"}
    assert report.new_rows[INSTANCE] == counting.pictures == 5
    assert counting.names == []
    _assert_equals_fresh(copied_cache, "more", extraction(tmp_path / "fresh", proposals=more))


def test_damaged_rows_are_not_copied(copied_cache: Path, tmp_path: Path, proposals: Path, extraction: Config) -> None:
    """A copy would have a checksum that is right, and nobody would ever find the damage."""
    key = FeatureCache(copied_cache).key(INSTANCE)
    shard = copied_cache / INSTANCE / key / "embedding" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    more = _write_proposals(
        tmp_path / "more.json",
        [*json.loads(proposals.read_text()), {"image_id": 2, "bbox": [1.5, 4, 30, 20], "score": 0.5}],
    )
    with pytest.raises(HdovdError, match=rf"{key}/embedding/c/0/0 is damaged.*verify --repair"):
        extract_clip(extraction(copied_cache, proposals=more, features="more"))
    assert "more" not in Catalog(copied_cache).sets()


def test_other_scores_compute_no_row(
    copied_cache: Path, tmp_path: Path, proposals: Path, extraction: Config, counting: Any
) -> None:
    """Their order in an image follows the scores: the rows of the instance level move, and are copied."""
    entries = [entry | {"score": 1 - entry["score"]} for entry in json.loads(proposals.read_text())]
    other = _write_proposals(tmp_path / "other.json", entries)
    report = extract_clip(extraction(copied_cache, proposals=other, features="other"), counting)
    assert _decisions(report) == {BOXES: "extract", INSTANCE: "extend", PSEUDO_LABEL: "extract"}
    assert report.new_rows[INSTANCE] == len(counting.batches) == 0
    _assert_equals_fresh(copied_cache, "other", extraction(tmp_path / "fresh", proposals=other))


def test_more_images_extend(
    copied_world: Path, tmp_path: Path, extraction: Config, counting: Any, kept: list[int]
) -> None:
    """They stand between those that were there; parts are small, so that rows move from part to part."""
    _edit(copied_world, _keep_images(lambda i: i % 3 > 0))
    old = [i for i in kept if i % 3 > 0]
    before = extract_clip(extraction(tmp_path / "cache", data=copied_world, part_rows=16))
    assert before.rows[IMAGE] == len(old)
    report = extract_clip(extraction(tmp_path / "cache", part_rows=16), counting)
    assert _decisions(report) == {BOXES: "extract", INSTANCE: "extend", IMAGE: "extend", PSEUDO_LABEL: "extract"}
    new = {level: report.rows[level] - before.rows[level] for level in (INSTANCE, IMAGE)}
    assert {level: report.new_rows[level] for level in new} == new
    assert counting.pictures == sum(new.values()) > 50
    _assert_equals_fresh(tmp_path / "cache", "default", extraction(tmp_path / "fresh", part_rows=16))


def test_fewer_images_compute_no_row(
    copied_world: Path, copied_cache: Path, tmp_path: Path, extraction: Config, counting: Any
) -> None:
    _edit(copied_world, _keep_images(lambda i: i % 3 > 0))
    report = extract_clip(extraction(copied_cache, data=copied_world, features="fewer"), counting)
    assert _decisions(report) == {BOXES: "extract", INSTANCE: "extend", IMAGE: "extend", PSEUDO_LABEL: "extract"}
    assert report.new_rows[INSTANCE] == report.new_rows[IMAGE] == len(counting.batches) == 0
    _assert_equals_fresh(copied_cache, "fewer", extraction(tmp_path / "fresh", data=copied_world))


@pytest.mark.parametrize("change", ["id", "size"])
def test_image_that_is_another_is_extracted_anew(
    copied_world: Path, copied_cache: Path, tmp_path: Path, extraction: Config, change: str, counting: Any
) -> None:
    """With its crops, even where the boxes are the same; the others are copied."""

    def edit(tree: dict[str, Any]) -> None:
        (entry,) = [i for i in tree["images"] if i["id"] == 5]
        if change == "id":
            entry["id"] = 5005
            for a in tree["annotations"]:
                a["image_id"] = 5005 if a["image_id"] == 5 else a["image_id"]
        else:
            entry["width"] += 8
            with Image.open(copied_world / "train2017" / entry["file_name"]) as picture:
                picture.resize((entry["width"], entry["height"])).save(copied_world / "train2017" / entry["file_name"])

    _edit(copied_world, edit)
    changes = {"data": copied_world, "vocabulary": None, "captions": None}
    report = extract_clip(extraction(copied_cache, features="other", **changes), counting)
    assert report.new_rows[IMAGE] == 1
    assert counting.pictures == report.new_rows[IMAGE] + report.new_rows[INSTANCE]
    assert 1 < report.new_rows[INSTANCE] < report.rows[INSTANCE] / 5
    extract_clip(extraction(tmp_path / "fresh", **changes))
    for level in (IMAGE, INSTANCE):
        np.testing.assert_array_equal(
            _stored(copied_cache, level, features="other"), _stored(tmp_path / "fresh", level)
        )


def test_half_of_a_product_gives_what_it_has(
    tmp_path: Path, proposals: Path, extraction: Config, counting: Any
) -> None:
    """The extraction of the old proposals was broken off; the one of the new ones takes over its finished parts."""
    extract_clip(extraction(tmp_path / "cache", part_rows=16))
    folder = tmp_path / "cache" / "instance" / FeatureCache(tmp_path / "cache").key(INSTANCE)
    for part in (1, 5):
        (folder / "parts" / f"{part:06d}.json").unlink()
        (folder / "embedding" / "c" / str(part) / "0").unlink()
    (tmp_path / "cache" / "sets" / "default.json").unlink()
    new = {"image_id": 2, "bbox": [1, 2, 30, 20], "score": 0.5}
    more = _write_proposals(tmp_path / "more.json", [*json.loads(proposals.read_text()), new])
    report = extract_clip(extraction(tmp_path / "cache", part_rows=16, proposals=more), counting)
    assert report.levels[INSTANCE] == "extend"
    assert report.new_rows[INSTANCE] == counting.pictures == 2 * 16 + 1
    _assert_equals_fresh(tmp_path / "cache", "default", extraction(tmp_path / "fresh", part_rows=16, proposals=more))


def test_missing_parts_are_made_and_nothing_else(
    tmp_path: Path, extraction: Config, counting: Any, contents: Callable[..., Any]
) -> None:
    extract_clip(extraction(tmp_path / "cache", part_rows=16))
    whole = contents(tmp_path / "cache")
    folder = tmp_path / "cache" / "instance" / FeatureCache(tmp_path / "cache").key(INSTANCE)
    for part in (1, 5):
        (folder / "parts" / f"{part:06d}.json").unlink()
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(tmp_path / "cache", part_rows=16), counting)
    parts = -(-report.rows[INSTANCE] // 16)
    assert _decisions(report) == {INSTANCE: "extend"}
    assert any(f"goes on: {parts - 2} of {parts} parts are done" in line for line in lines)
    assert report.new_rows[INSTANCE] == counting.pictures == 2 * 16
    assert contents(tmp_path / "cache") == whole


# --- sizes of parts ---


def test_nouns_can_be_added_with_other_sizes_of_parts(tmp_path: Path, extraction: Config) -> None:
    """A pseudo label's part is made with that of its crops, so its size is theirs, whatever is asked for."""
    extract_clip(extraction(tmp_path / "cache", vocabulary=None, captions=None, part_rows=16))
    report = extract_clip(extraction(tmp_path / "cache", part_rows=100))
    assert report.whole
    _assert_equals_fresh(tmp_path / "cache", "default", extraction(tmp_path / "fresh", part_rows=16))


@pytest.mark.parametrize("nouns", [True, False], ids=["with nouns", "without nouns"])
def test_process_that_began_later_takes_over_the_size_of_parts(tmp_path: Path, extraction: Config, nouns: bool) -> None:
    """Both planned on an empty folder, with parts of other sizes; the first to begin may want no nouns."""
    late = prepare(extraction(tmp_path / "cache", part_rows=100))
    early = prepare(
        extraction(tmp_path / "cache", part_rows=16, **({} if nouns else {"vocabulary": None, "captions": None}))
    )
    early.begin(Catalog.create(tmp_path / "cache"))
    late.begin(Catalog(tmp_path / "cache"))
    for extraction_ in (late, early):
        for units in extraction_.units():
            assert extraction_.do(units) == []
    assert late.whole
    assert late.product(INSTANCE).parts == -(-late.product(INSTANCE).rows // 16)


# --- claims ---


@pytest.mark.parametrize("level", [INSTANCE, PSEUDO_LABEL, CLASS], ids=str)
def test_part_of_a_process_that_hangs_is_done_after_some_time(
    tmp_path: Path, extraction: Config, monkeypatch: pytest.MonkeyPatch, level: Level
) -> None:
    """And until then everything else is: here the claim is never let go."""
    monkeypatch.setattr(store, "CLAIM_WAIT_S", 0.3)
    config = extraction(tmp_path / "cache", part_rows=32)
    begun = prepare(config)
    begun.begin(Catalog.create(config.cache))
    part = 0 if level is CLASS else 1
    with open_folder(config.cache).claim(f"{begun.product(level).prefix}/{part}", wait=False) as mine:
        assert mine
        pictures = begun.units()[1]
        if level is not CLASS:
            assert begun.do(begun.units()[0]) == []
            assert begun.do(pictures) == [Unit(INSTANCE, 1)]
            assert [unit for unit in pictures if unit not in begun.left()] == [
                unit for unit in pictures if unit != Unit(INSTANCE, 1)
            ]
        assert extract_clip(config).whole
