"""Extraction on bad input: what cannot be used is counted and listed, what cannot be right is an error that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hdovd.cache import Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip, prepare

Config = Callable[..., ExtractConfig]


# --- proposals ---

BAD_PROPOSALS: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({"bbox": [5000, 10, 20, 20], "score": 0.5}, "outside the image"),
    "left of": ({"bbox": [-50, 10, 50, 20], "score": 0.5}, "outside the image"),
    "no width": ({"bbox": [10, 10, 0, 20], "score": 0.5}, "no area"),
    "inverted": ({"bbox": [50, 50, -20, 20], "score": 0.5}, "inverted"),
    "nan": ({"bbox": [10, float("nan"), 20, 20], "score": 0.5}, "not finite"),
    "infinite": ({"bbox": [10, 10, float("inf"), 20], "score": 0.5}, "not finite"),
    "three numbers": ({"bbox": [10, 10, 20], "score": 0.5}, "not four numbers"),
    "words": ({"bbox": [10, 10, "20", 20], "score": 0.5}, "not four numbers"),
    "no box": ({"bbox": None, "score": 0.5}, "not four numbers"),
    "nan score": ({"bbox": [10, 10, 20, 20], "score": float("nan")}, "score"),
    "score in words": ({"bbox": [10, 10, 20, 20], "score": "high"}, "score"),
    "no score": ({"bbox": [10, 10, 20, 20], "score": None}, "score"),
    "unknown image": ({"bbox": [10, 10, 20, 20], "score": 0.5, "image_id": 987654}, "not in the training set"),
}


def test_bad_proposals_are_counted_and_leave_no_rows(
    tmp_path: Path, proposals: Path, copied_cache: Path, extraction: Config
) -> None:
    entries = json.loads(proposals.read_text())
    for number, (entry, _) in enumerate(BAD_PROPOSALS.values()):
        entries.insert(number * 3, {"image_id": 1} | entry)
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, proposals=tmp_path / "bad.json"))
    assert set(report.levels.values()) == {"hit"}  # what is left is what the good file holds
    text = "\n".join(line for line in lines if line.startswith("skipped"))
    assert sum(
        int(line.split(":")[0].removeprefix("skipped ")) for line in text.splitlines() if "proposal" in line
    ) >= len(BAD_PROPOSALS)
    for _, reason in BAD_PROPOSALS.values():
        assert reason in text
    assert "987654" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no proposals.*hdovd propose"),
        ("{}", "no proposal file"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "no proposal file"),
        ("[[1, 2, 3, 4]]", "no proposal file"),
        ('[{"image_id": 1, "bb', "not valid JSON"),
        ('[{"image_id": 987654, "bbox": [1, 2, 30, 40], "score": 1}]', "no usable proposal.*987654"),
        ('[{"image_id": 1, "bbox": [1, 2, 0, 40], "score": 1}]', "no usable proposal.*no area"),
        ('[{"image_id": [1], "bbox": [1, 2, 30, 40], "score": 1}]', "proposal"),
        (None, "no file"),
    ],
    ids=[
        "empty",
        "dict",
        "without score",
        "bare boxes",
        "cut off",
        "unknown images alone",
        "unusable alone",
        "id is a list",
        "missing",
    ],
)
def test_proposal_file_that_cannot_be_used(
    tmp_path: Path, extraction: Config, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(HdovdError, match=f"(?s)p.json.*{message}|{message}.*p.json"):
        extract_clip(extraction(tmp_path / "cache", proposals=tmp_path / "p.json"))
    assert not (tmp_path / "cache").exists()


def test_without_proposals_base_boxes_alone_are_cached(tmp_path: Path, extraction: Config) -> None:
    lines: list[str] = []
    with lines_to(lines.append):
        extract_clip(extraction(tmp_path / "cache", proposals=None, vocabulary=None, captions=None))
    reader = FeatureCache(tmp_path / "cache")
    assert len(reader.instances(1).proposals().box) == 0
    assert len(reader.instances(1).base_boxes().box) > 0
    assert any("no --proposals" in line for line in lines)


# --- nouns and other options ---


@pytest.mark.parametrize("content", [None, "", "\n  \n# only a comment\n"], ids=["missing", "empty", "comments"])
def test_vocabulary_without_names(tmp_path: Path, extraction: Config, content: str | None) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(HdovdError, match=r"--vocabulary.*words.txt"):
        extract_clip(extraction(tmp_path / "cache", vocabulary=tmp_path / "words.txt"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "[]",
        '{"annotations": {}}',
        '{"annotations": [{"image_id": 1, "cap',
        '{"annotations": []}',
        '{"annotations": [{"image_id": 1, "caption": "nothing of note"}]}',
        '{"annotations": [{"image_id": 1}]}',
        '{"annotations": [{"caption": "a car"}]}',
        '{"annotations": [{"image_id": 1, "caption": null}]}',
        '{"annotations": ["a car"]}',
    ],
    ids=[
        "missing",
        "list",
        "no list",
        "cut off",
        "empty",
        "no word",
        "no caption",
        "no image",
        "null caption",
        "bare text",
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, extraction: Config, content: str | None) -> None:
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    with pytest.raises(HdovdError, match=r"captions\.json"):
        extract_clip(extraction(tmp_path / "cache", captions=tmp_path / "captions.json"))
    assert not (tmp_path / "cache").exists()


def test_options_that_need_another(tmp_path: Path, extraction: Config) -> None:
    with pytest.raises(HdovdError, match="--captions needs --vocabulary"):
        extraction(tmp_path / "cache", vocabulary=None)
    with pytest.raises(HdovdError, match=r"--vocabulary.*--proposals"):
        extraction(tmp_path / "cache", proposals=None)


@pytest.mark.parametrize("part_rows", [0, -1, 1025, 65537])
def test_rows_of_a_part_fit_chunks(tmp_path: Path, extraction: Config, part_rows: int) -> None:
    with pytest.raises(HdovdError, match=f"--part-rows {part_rows}: expected at most 1024, or a multiple"):
        extraction(tmp_path / "cache", part_rows=part_rows)


@pytest.mark.parametrize("part_rows", [1, 100, 1024, 17 * 1024, 21 * 1024, 64 * 1024, 100 * 1024])
def test_any_rows_of_a_part_suit_all_levels(tmp_path: Path, extraction: Config, counting: Any, part_rows: int) -> None:
    """Also the image level, whose parts are smaller."""
    begun = prepare(extraction(tmp_path / "cache", part_rows=part_rows), counting)
    begun.begin(Catalog.create(tmp_path / "cache"))
    assert begun.product(Level.INSTANCE).part_rows == begun.product(Level.PSEUDO_LABEL).part_rows == part_rows
    assert 1 <= begun.product(Level.IMAGE).part_rows <= part_rows


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a photo of a {}", "{} and {}")], ids=str)
def test_template_must_hold_the_name_once(tmp_path: Path, extraction: Config, templates: tuple[str, ...]) -> None:
    with pytest.raises(HdovdError, match="template"):
        extraction(tmp_path / "cache", templates=templates)


def test_class_names_that_the_annotations_do_not_know(world: Path, tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "other.toml").write_text('name = "other"\nbase = ["car", "umbrela"]\nnovel = ["star"]\n')
    with pytest.raises(HdovdError, match=r"'umbrela' \(the file has 'umbrella'\)"):
        extract_clip(extraction(tmp_path / "cache", protocol=str(tmp_path / "other.toml")))


def test_no_base_box_at_all(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    with pytest.raises(HdovdError, match="no usable box"):
        extract_clip(extraction(tmp_path / "cache", data=copied_world))
