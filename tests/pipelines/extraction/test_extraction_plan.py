"""What an extraction finds in a cache: hit, extend or extract, with the reason; and that only what is new is
computed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from hdovd.cache import Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.demo.world import NOVEL
from hdovd.pipelines.embedding.crop_recipe import CropRecipe
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import ExtractReport, extract_clip, prepare
from hdovd.pipelines.teachers.openclip import load_clip

Config = Callable[..., ExtractConfig]
Untouched = Callable[[Path], Any]
TEMPLATES = ("a photo of a {}", "{} in the snow")
BOXES, INSTANCE, IMAGE, CLASS, NOUN, PSEUDO_LABEL = Level


def _decisions(report: ExtractReport) -> dict[Level, str]:
    """Of the levels that were no hit."""
    return {level: decision for level, decision in report.levels.items() if decision != "hit"}


def _planned(lines: list[str], level: Level) -> str:
    """What the log says of a level: its line of the plan and the reasons below it."""
    (found,) = re.findall(rf"^  {level} .*(?:\n   .*)*", "\n".join(lines), re.MULTILINE)
    return str(found)


def _edit(world: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


# --- hits ---


def test_second_run_is_a_hit_and_writes_nothing(
    copied_cache: Path, extraction: Config, counting: Any, untouched: Untouched
) -> None:
    lines: list[str] = []
    with untouched(copied_cache), lines_to(lines.append):
        report = extract_clip(extraction(copied_cache), counting)
    assert list(report.levels) == list(Level)
    assert _decisions(report) == {}
    assert set(report.new_rows.values()) == {0}
    assert report.whole
    assert (counting.batches, counting.names) == ([], [])
    assert "everything is there: nothing to extract" in lines


@pytest.mark.parametrize("changes", [{"batch_size": 7}, {"workers": 1}, {"part_rows": 16}], ids=str)
def test_how_it_is_computed_is_no_reason_to_compute_again(
    copied_cache: Path, extraction: Config, changes: dict[str, Any], untouched: Untouched
) -> None:
    with untouched(copied_cache):
        assert _decisions(extract_clip(extraction(copied_cache, **changes))) == {}


def test_same_data_at_another_path_and_same_clip_in_another_folder_are_hits(
    copied_world: Path, copied_cache: Path, clip: str, proposals: Path, tmp_path: Path, extraction: Config
) -> None:
    moved = shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "moved clip")
    shutil.copy(proposals, tmp_path / "other name.json")
    report = extract_clip(
        extraction(copied_cache, data=copied_world, clip=f"local-dir:{moved}", proposals=tmp_path / "other name.json")
    )
    assert _decisions(report) == {}


def test_novel_annotations_leave_no_trace_in_the_cache(
    copied_world: Path, copied_cache: Path, extraction: Config
) -> None:
    def without_novel(tree: dict[str, Any]) -> None:
        novel = {c["id"] for c in tree["categories"] if c["name"] in NOVEL}
        assert any(a["category_id"] in novel for a in tree["annotations"])
        tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] not in novel]

    _edit(copied_world, without_novel)
    assert _decisions(extract_clip(extraction(copied_cache, data=copied_world))) == {}


# --- the plan ---


def test_dry_run_says_what_it_would_do_and_writes_nothing(
    tmp_path: Path, extraction: Config, kept: list[int], untouched: Untouched
) -> None:
    lines: list[str] = []
    with untouched(tmp_path), lines_to(lines.append):
        report = extract_clip(extraction(tmp_path / "folder" / "cache", dry_run=True))
    assert set(report.levels.values()) == {"extract"}
    text = "\n".join(lines)
    for level in Level:
        planned = _planned(lines, level)
        assert planned.startswith(f"  {level} ")
        assert planned.endswith("no cache yet")
        assert f" {report.rows[level]:,d} " in planned
    assert report.rows[IMAGE] == report.new_rows[IMAGE] == len(kept)
    assert report.rows[INSTANCE] == report.new_rows[INSTANCE] > 200
    size = report.rows[INSTANCE] * 24 * 2 / 1000  # 24 float16 values a row
    assert f"{size:.1f} kB" in text
    assert f"{report.rows[IMAGE] + report.rows[INSTANCE]:,d} pictures and boxes: about" in text
    assert lines[-1] == "a dry run: nothing was written"


def test_dry_run_on_a_cache_writes_nothing(copied_cache: Path, extraction: Config, untouched: Untouched) -> None:
    lines: list[str] = []
    with untouched(copied_cache), lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, templates=TEMPLATES, dry_run=True))
    assert _decisions(report) == dict.fromkeys((CLASS, NOUN, PSEUDO_LABEL), "extract")


def _other_proposals(tmp_path: Path, proposals: Path) -> dict[str, Any]:
    entries = json.loads(proposals.read_text())
    entries[0]["bbox"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(entries))
    return {"proposals": tmp_path / "other.json"}


def _other_clip(tmp_path: Path, save_clip: Callable[..., str]) -> dict[str, Any]:
    return {"clip": save_clip(tmp_path / "other clip", seed=1)}


def _other_preprocessing(tmp_path: Path, save_clip: Callable[..., str]) -> dict[str, Any]:
    return {"clip": save_clip(tmp_path / "other clip", preprocess={"mean": [0.5, 0.5, 0.5]})}


def _other_vocabulary(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "words.txt").write_text("car\nstar\n")
    return {"vocabulary": tmp_path / "words.txt"}


MODEL = {level: "extract" for level in Level if level is not BOXES}


@pytest.mark.parametrize(
    ("change", "reasons", "decisions"),
    [
        (
            _other_proposals,
            {BOXES: r"proposals\.hash differs", INSTANCE: r"boxes\.hash differs", PSEUDO_LABEL: "instance differs"},
            {BOXES: "extract", INSTANCE: "extend", PSEUDO_LABEL: "extract"},
        ),
        (
            lambda: {"templates": TEMPLATES},
            {
                CLASS: r'templates differs: expected \["a photo of a {}", "{} in the snow"\], the cache has '
                r'\["a photo of a {}"\]'
            },
            dict.fromkeys((CLASS, NOUN, PSEUDO_LABEL), "extract"),
        ),
        (lambda: {"captions": None}, {PSEUDO_LABEL: 'offered differs: expected "all"'}, {PSEUDO_LABEL: "extract"}),
        (
            _other_vocabulary,
            {NOUN: r'names differs: expected \["car", "star"\]', PSEUDO_LABEL: "noun differs"},
            {NOUN: "extract", PSEUDO_LABEL: "extract"},
        ),
        (_other_clip, dict.fromkeys((INSTANCE, IMAGE, CLASS, NOUN), r"clip\.weights_sha256 differs"), MODEL),
        (
            _other_preprocessing,
            {IMAGE: r"preprocessing\.mean differs: expected \[0\.5, 0\.5, 0\.5\], the cache has \[0\.5, 0\.4, 0\.45\]"},
            dict.fromkeys((INSTANCE, IMAGE, PSEUDO_LABEL), "extract"),
        ),
        (
            lambda: {"precision": Precision.BF16},
            {IMAGE: r'clip\.compute_dtype differs: expected "bfloat16", the cache has "float32"'},
            MODEL,
        ),
    ],
    ids=["proposals", "templates", "captions", "vocabulary", "clip", "preprocessing", "precision"],
)
def test_other_input_is_named_and_its_products_stand_beside_the_old_ones(
    request: pytest.FixtureRequest,
    copied_cache: Path,
    extraction: Config,
    contents: Callable[..., Any],
    cache: Path,
    change: Callable[..., dict[str, Any]],
    reasons: dict[Level, str],
    decisions: dict[Level, str],
) -> None:
    wanted = [
        n
        for n in ("tmp_path", "proposals", "save_clip")
        if n in change.__code__.co_varnames[: change.__code__.co_argcount]
    ]
    changes = change(**{name: request.getfixturevalue(name) for name in wanted}) | {"features": "other"}
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, **changes))
    assert _decisions(report) == decisions
    for level, reason in reasons.items():
        assert re.search(reason, _planned(lines, level)), lines
    assert contents(cache).items() <= contents(copied_cache).items()  # nothing that was there has changed
    one, other = FeatureCache(copied_cache), FeatureCache(copied_cache, "other")
    assert {level for level in Level if one.key(level) != other.key(level)} == decisions.keys()
    other.require_together()
    assert _decisions(extract_clip(extraction(copied_cache, **changes))) == {}
    assert _decisions(extract_clip(extraction(copied_cache))) == {}


def test_what_made_a_product_is_readable_in_its_attributes(cache: Path, clip: str) -> None:
    """With zarr alone: the inputs of the key, and what did not count."""
    teacher, found = load_clip(clip, None, device="cpu"), dict[Level, Any]()
    for product in Catalog(cache).products():
        attributes: Any = dict(zarr.open_group(cache / product.prefix, mode="r").attrs)
        found[product.level] = attributes
        assert attributes["key"] == product.key
        assert attributes["key_inputs"]["schema_version"] == attributes["schema_version"]
    assert found.keys() == set(Level)
    for level in (INSTANCE, IMAGE, CLASS, NOUN):
        assert found[level]["key_inputs"]["clip"] == teacher.identity
        assert found[level]["made_with"] == teacher.made_with | {"batch_size": teacher.best_batch()}
    for level in (INSTANCE, IMAGE):
        assert found[level]["key_inputs"]["preprocessing"] == teacher.preprocessing
    assert found[INSTANCE]["key_inputs"]["crop"] == {"shape": "box", "scales": [1.0]}
    assert found[CLASS]["key_inputs"]["templates"] == ["a photo of a {}"]
    assert found[CLASS]["names"] == found[CLASS]["key_inputs"]["names"] == FeatureCache(cache).names(CLASS)
    assert {"images", "boxes", "base_boxes", "proposals"} <= found[BOXES]["key_inputs"].keys()
    assert found[PSEUDO_LABEL]["key_inputs"]["instance"] == found[INSTANCE]["key"]


# --- folders ---


def test_cache_of_another_schema_is_refused_before_anything_is_computed(
    copied_cache: Path, extraction: Config, untouched: Untouched, counting: Any
) -> None:
    zarr.open_group(copied_cache, mode="r+").attrs["schema_version"] = 99
    with untouched(copied_cache), pytest.raises(HdovdError, match="schema 99"):
        extract_clip(extraction(copied_cache), counting)
    assert counting.batches == []


def test_empty_folder_can_take_a_cache(tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "cache").mkdir()
    extract_clip(extraction(tmp_path / "cache"))
    assert FeatureCache(tmp_path / "cache").levels() == list(Level)


def test_folder_with_something_else_is_never_taken(
    tmp_path: Path, extraction: Config, untouched: Untouched, counting: Any
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"precious")
    with untouched(tmp_path / "photos"), pytest.raises(HdovdError, match=r"photos is not empty .*mine\.jpg"):
        extract_clip(extraction(tmp_path / "photos"), counting)
    assert counting.batches == []


def test_ctrl_c_says_what_stays_and_the_same_command_goes_on(
    extraction: Config, counting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, lines, config = (
        counting.embed_images,
        list[str](),
        extraction(tmp_path / "cache", part_rows=20, batch_size=20),
    )

    def pressed(pixels: Any) -> Any:
        if len(counting.batches) == 9:
            raise KeyboardInterrupt
        return embed(pixels)

    monkeypatch.setattr(counting, "embed_images", pressed)
    with pytest.raises(KeyboardInterrupt), lines_to(lines.append):
        extract_clip(config, counting)
    (line,) = [line for line in lines if line.startswith("stopped: ")]
    records = {file: file.read_bytes() for file in (tmp_path / "cache").glob("*/*/parts/0*.json")}
    assert int(line.split()[1]) == len(records) > 0
    monkeypatch.setattr(counting, "embed_images", embed)
    with lines_to(lines.append):
        report = extract_clip(config, counting)
    assert report.whole
    assert 0 < report.new_rows[IMAGE] < report.rows[IMAGE]
    assert {file: file.read_bytes() for file in records} == records


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.5)])
def test_probe_does_not_count_what_fills_up_a_batch(
    extraction: Config, counting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: tuple[float, ...]
) -> None:
    """By a clock that only the model moves: a second a crop, those included that fill up a batch of more than there
    are.
    """
    now, embed = [0.0], counting.embed_images

    def second_each(pixels: Any) -> Any:
        now[0] += len(pixels)
        return embed(pixels)

    monkeypatch.setattr(counting, "embed_images", second_each)
    monkeypatch.setattr("hdovd.pipelines.extraction.engine.PROBE_BATCH_CPU", 1_000)
    monkeypatch.setattr("hdovd.pipelines.extraction.engine.time.monotonic", lambda: now[0])
    config = extraction(tmp_path / "cache", batch_size=1_000, recipe=CropRecipe(scales=scales))
    costs = prepare(config, counting).probe()
    assert costs[INSTANCE].embed_s == pytest.approx(len(scales))
    assert costs[IMAGE].embed_s == pytest.approx(1)
    assert costs[INSTANCE].cut_s == 0
