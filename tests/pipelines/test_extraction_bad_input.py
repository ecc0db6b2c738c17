"""Extraction on bad input: one broken picture is counted and listed, what cannot be right is an error that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.coco import DataPaths
from hdovd.config import Recipe
from hdovd.errors import HdovdError
from hdovd.pipelines.extract_clip import extract_clip
from hdovd.pipelines.extract_config import ExtractConfig
from hdovd.pipelines.training_set import TrainingSet
from hdovd.protocol import load_protocol

Config = Callable[..., ExtractConfig]
MISSING, TRUNCATED, RESIZED, EMPTY, TEXT = 1, 2, 3, 4, 5


def _silent(_: str) -> None: ...


def _file(world: Path, image_id: int) -> Path:
    return world / "train2017" / f"{image_id:012d}.jpg"


def _break_pictures(world: Path) -> dict[int, str]:
    """Damage five pictures; returns what the reason of each must hold."""
    _file(world, MISSING).unlink()
    content = _file(world, TRUNCATED).read_bytes()
    _file(world, TRUNCATED).write_bytes(content[: len(content) // 2])
    with Image.open(_file(world, RESIZED)) as picture:
        size = picture.size
        picture.resize((size[0] + 1, size[1])).save(_file(world, RESIZED))
    _file(world, EMPTY).write_bytes(b"")
    _file(world, TEXT).write_text("<html>404</html>")
    return {MISSING: "no such file", TRUNCATED: "truncated", RESIZED: f"{size[0] + 1}x{size[1]}.*{size[0]}x{size[1]}",
            EMPTY: "cannot identify", TEXT: "cannot identify"}


def _training_set(world: Path, cache: Path, recipe: Recipe, log: Callable[[str], None] = _silent) -> TrainingSet:
    from hdovd.coco import load_split

    split = load_split(world / "annotations" / "instances_train2017.json", world / "train2017",
                       load_protocol(str(world / "protocol.toml")), base_only=True)
    return TrainingSet(split, FeatureCache(cache), recipe, log)


# --- pictures ---

def test_broken_pictures_are_counted_listed_and_left_out_of_training(
        copied_world: Path, tmp_path: Path, extraction: Config, cache: Path, kept: list[int], micro_recipe: Callable[..., Recipe]) -> None:
    reasons = _break_pictures(copied_world)
    assert reasons.keys() <= set(kept)
    lines: list[str] = []
    report = extract_clip(extraction(tmp_path / "cache", data=copied_world, batch_size=16), lines.append)
    assert report.failed.keys() == reasons.keys()
    for image_id, reason in reasons.items():
        (line,) = [line for line in lines if f"image {image_id}:" in line]
        assert str(_file(copied_world, image_id)) in line
        assert re.search(reason, line)
    assert any("5 images have no embeddings" in line for line in lines)
    reader, whole = FeatureCache(tmp_path / "cache"), FeatureCache(cache)
    assert reader.failed() == report.failed
    for image_id in kept:  # the others have their own rows, not their neighbours'
        rows, wanted = reader.instances(image_id), whole.instances(image_id)
        np.testing.assert_array_equal(rows.box, wanted.box)
        if image_id in reasons:
            assert not rows.embedding.any()
            assert not reader.image_embedding(image_id).any()
        else:
            np.testing.assert_allclose(rows.embedding, wanted.embedding, atol=1e-3)
            np.testing.assert_allclose(reader.image_embedding(image_id), whole.image_embedding(image_id), atol=1e-3)
    told: list[str] = []
    data = _training_set(copied_world, tmp_path / "cache", micro_recipe(), told.append)
    assert {image.id for image in data.images} == set(kept) - reasons.keys()
    assert any(line.startswith("skipped 5") for line in told)
    for index in range(len(data)):
        assert data[index][1].embeddings.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


def test_pictures_that_were_repaired_are_extracted(copied_world: Path, world: Path, tmp_path: Path, extraction: Config) -> None:
    """The remedy for a failed image is to repair the file and to run the same command again."""
    content = _file(world, MISSING).read_bytes()
    _file(copied_world, MISSING).unlink()
    assert extract_clip(extraction(tmp_path / "cache", data=copied_world), _silent).failed.keys() == {MISSING}
    _file(copied_world, MISSING).write_bytes(content)
    extract_clip(extraction(tmp_path / "cache", data=copied_world, overwrite=True), _silent)
    reader = FeatureCache(tmp_path / "cache")
    assert reader.failed() == {}
    assert reader.image_embedding(MISSING).any()


def test_no_readable_picture_is_an_error_and_leaves_no_cache(copied_world: Path, clip: str, tmp_path: Path) -> None:
    for picture in (copied_world / "train2017").iterdir():
        picture.unlink()
    config = ExtractConfig(DataPaths(copied_world), tmp_path / "cache", clip, protocol=str(copied_world / "protocol.toml"), device="cpu")
    with pytest.raises(HdovdError, match=r"no picture of .*no such file"):
        extract_clip(config, lambda _: None)
    assert not (tmp_path / "cache").exists()


def test_image_that_failed_in_one_level_alone_does_not_train(copied_world: Path, world: Path, tmp_path: Path, proposals: Path,
                                                             extraction: Config, micro_recipe: Callable[..., Recipe]) -> None:
    """The image level is taken over from a run in which the picture was missing, the instance level is new: the zero
    image embedding must not become a training target."""
    content = _file(world, MISSING).read_bytes()
    _file(copied_world, MISSING).unlink()
    extract_clip(extraction(tmp_path / "cache", data=copied_world), _silent)
    _file(copied_world, MISSING).write_bytes(content)
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads(proposals.read_text())[2:]))
    extract_clip(extraction(tmp_path / "cache", data=copied_world, proposals=tmp_path / "fewer.json", overwrite=True), _silent)
    data = _training_set(copied_world, tmp_path / "cache", micro_recipe())
    for index in range(len(data)):
        _, targets, image_id = data[index]
        assert float(targets.image_embedding.norm()) == pytest.approx(1, abs=1e-5), image_id


def test_no_picture_at_all(copied_world: Path, tmp_path: Path, extraction: Config, micro_recipe: Callable[..., Recipe]) -> None:
    """A wrong --images folder: whichever command says so, training does not start."""
    for file in (copied_world / "train2017").iterdir():
        file.unlink()

    def run() -> None:
        extract_clip(extraction(tmp_path / "cache", data=copied_world), _silent)
        _training_set(copied_world, tmp_path / "cache", micro_recipe())

    with pytest.raises(HdovdError, match="no such file"):
        run()


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


def test_bad_proposals_are_counted_and_leave_no_rows(tmp_path: Path, proposals: Path, copied_cache: Path, extraction: Config) -> None:
    entries = json.loads(proposals.read_text())
    for number, (entry, _) in enumerate(BAD_PROPOSALS.values()):
        entries.insert(number * 3, {"image_id": 1} | entry)
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    lines: list[str] = []
    report = extract_clip(extraction(copied_cache, proposals=tmp_path / "bad.json"), lines.append)
    assert set(report.levels.values()) == {"hit"}  # what is left is what the good file holds
    text = "\n".join(line for line in lines if line.startswith("skipped"))
    assert sum(int(line.split(":")[0].removeprefix("skipped ")) for line in text.splitlines() if "proposal" in line) >= len(BAD_PROPOSALS)
    for _, reason in BAD_PROPOSALS.values():
        assert reason in text
    assert "987654" in text


@pytest.mark.parametrize(("content", "message"), [
    ("[]", "no proposals.*hdovd propose"),
    ("{}", "no proposal file"),
    ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "no proposal file"),
    ("[[1, 2, 3, 4]]", "no proposal file"),
    ('[{"image_id": 1, "bb', "not valid JSON"),
    ('[{"image_id": 987654, "bbox": [1, 2, 30, 40], "score": 1}]', "no usable proposal.*987654"),
    ('[{"image_id": 1, "bbox": [1, 2, 0, 40], "score": 1}]', "no usable proposal.*no area"),
    ('[{"image_id": [1], "bbox": [1, 2, 30, 40], "score": 1}]', "proposal"),
    (None, "no file"),
], ids=["empty", "dict", "without score", "bare boxes", "cut off", "unknown images alone", "unusable alone", "id is a list", "missing"])
def test_proposal_file_that_cannot_be_used(tmp_path: Path, extraction: Config, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(HdovdError, match=f"(?s)p.json.*{message}|{message}.*p.json"):
        extract_clip(extraction(tmp_path / "cache", proposals=tmp_path / "p.json"), _silent)
    assert not (tmp_path / "cache").exists()


def test_without_proposals_base_boxes_alone_are_cached(tmp_path: Path, extraction: Config) -> None:
    lines: list[str] = []
    extract_clip(extraction(tmp_path / "cache", proposals=None, vocabulary=None, captions=None), lines.append)
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
        extract_clip(extraction(tmp_path / "cache", vocabulary=tmp_path / "words.txt"), _silent)


@pytest.mark.parametrize("content", [
    None, "[]", '{"annotations": {}}', '{"annotations": [{"image_id": 1, "cap', '{"annotations": []}',
    '{"annotations": [{"image_id": 1, "caption": "nothing of note"}]}',
    '{"annotations": [{"image_id": 1}]}', '{"annotations": [{"caption": "a car"}]}', '{"annotations": [{"image_id": 1, "caption": null}]}',
    '{"annotations": ["a car"]}',
], ids=["missing", "list", "no list", "cut off", "empty", "no word", "no caption", "no image", "null caption", "bare text"])
def test_captions_that_cannot_be_used(tmp_path: Path, extraction: Config, content: str | None) -> None:
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    with pytest.raises(HdovdError, match=r"captions\.json"):
        extract_clip(extraction(tmp_path / "cache", captions=tmp_path / "captions.json"), _silent)
    assert not (tmp_path / "cache").exists()


def test_options_that_need_another(tmp_path: Path, extraction: Config) -> None:
    with pytest.raises(HdovdError, match="--captions needs --vocabulary"):
        extraction(tmp_path / "cache", vocabulary=None)
    with pytest.raises(HdovdError, match=r"--vocabulary.*--proposals"):
        extraction(tmp_path / "cache", proposals=None)


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a photo of a {}", "{} and {}")], ids=str)
def test_template_must_hold_the_name_once(tmp_path: Path, extraction: Config, templates: tuple[str, ...]) -> None:
    with pytest.raises(HdovdError, match="template"):
        extraction(tmp_path / "cache", templates=templates)


def test_template_with_other_braces_is_text_or_refused(tmp_path: Path, extraction: Config) -> None:
    """Not a KeyError after the proposals have been read."""
    try:
        extract_clip(extraction(tmp_path / "cache", templates=("a {} {of sorts}",)), _silent)
    except HdovdError as error:
        assert "{of sorts}" in str(error)  # noqa: PT017
    else:
        assert Level.CLASS in FeatureCache(tmp_path / "cache").levels()


def test_class_names_that_the_annotations_do_not_know(world: Path, tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "other.toml").write_text('name = "other"\nbase = ["car", "umbrela"]\nnovel = ["star"]\n')
    with pytest.raises(HdovdError, match=r"'umbrela' \(the file has 'umbrella'\)"):
        extract_clip(extraction(tmp_path / "cache", protocol=str(tmp_path / "other.toml")), _silent)


def test_no_base_box_at_all(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    with pytest.raises(HdovdError, match="no usable box"):
        extract_clip(extraction(tmp_path / "cache", data=copied_world), _silent)
