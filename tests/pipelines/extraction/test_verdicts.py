"""Verdicts of another model: how they are read, mixed with CLIP's own names, known by the cache; bad ones refused."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hdovd.cache import Level, Source, hash_file
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import load_protocol, load_split
from hdovd.pipelines.cache_tools.verify import extract_command
from hdovd.pipelines.demo.world import BASE, GROUNDS
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.export import export_crops
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.identities import BoxTable, box_table
from hdovd.pipelines.extraction.pseudo_labels import FLOOR, read_verdicts
from hdovd.pipelines.extraction.source import ExportConfig, ExportForm
from hdovd.pipelines.proposal_files.file import read_table, usable_proposals

Config = Callable[..., ExtractConfig]
NAMES = ("key", "hot dog", "zeppelin")


@pytest.fixture(scope="module")
def table(world: Path, proposals: Path) -> BoxTable:
    split = load_split(
        world / "annotations" / "instances_train2017.json",
        world / "train2017",
        load_protocol(str(world / "protocol.toml")),
        base_only=True,
    )
    return box_table(split.images, usable_proposals(read_table(proposals), proposals, split.images, split.skips))


def line(table: BoxTable, of: int, **changes: Any) -> dict[str, Any]:
    """A verdict on a row of the table."""
    image = int(np.searchsorted(table.offset, of, "right")) - 1
    x, y, right, bottom = table.box[of].tolist()
    tree = {"image_id": int(table.image_id[image]), "bbox": [x, y, right - x, bottom - y], "names": {"key": 1}}
    return {name: value for name, value in (tree | changes).items() if value is not None}


def written(file: Path, *lines: Any) -> Path:
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
    return file


def rows_of(table: BoxTable) -> list[int]:
    return [int(row) for row in np.flatnonzero(table.source == Source.PROPOSAL)]


def test_scores_count_against_the_best_and_others_are_the_floor(table: BoxTable, tmp_path: Path) -> None:
    one, two, three, *_ = rows_of(table)
    file = written(
        tmp_path / "v.jsonl",
        line(table, two, names={"key": 0.8, "zeppelin": 0.2}),
        "",
        line(table, one, names={"Hot-dogs": 5, "key": 1e-9, "spaceship": 2}, others=0.25),
        {"row": three, "names": {"zeppelin": 1, "hot dogs": 0, "hotdog": 0.5}},
    )
    lines = list[str]()
    with lines_to(lines.append):
        found = read_verdicts(file, table, NAMES)
    assert lines == [
        f"{file}: left out 1 name that the vocabulary lacks: spaceship (1)",
        f"verdicts of {file}: on 3 of {len(rows_of(table))} proposals",
    ]
    added = found.of_rows(np.array([one, three, two, rows_of(table)[3]]), 3).exp()
    wanted = [[FLOOR, 1, 0.05], [FLOOR, 0.5, 1], [1, FLOOR, 0.25], [1, 1, 1]]
    torch.testing.assert_close(added, torch.tensor(wanted), rtol=1e-5, atol=1e-7)
    grounds = found.of_rows(np.array([one, two]), 4, (2, 3)).exp()  # a background that is named is as it is named
    torch.testing.assert_close(grounds, torch.tensor([[FLOOR, 1, 1, 1], [1, FLOOR, 0.25, 1]]), rtol=1e-5, atol=1e-7)
    told = written(
        tmp_path / "told.jsonl",
        line(table, one, names={"key": 0.5}, background=0.1),
        line(table, two, names={"key": 0.5, "zeppelin": 0.25}, background=0),
        line(table, three, names={"key": 0.5}, background=7),
    )
    grounds = read_verdicts(told, table, NAMES).of_rows(np.array([one, two, three]), 4, (2, 3)).exp()
    wanted = [[1, FLOOR, 0.2, 0.2], [1, FLOOR, 0.5, FLOOR], [1, FLOOR, 1, 1]]  # at most as the best name
    torch.testing.assert_close(grounds, torch.tensor(wanted), rtol=1e-5, atol=1e-7)
    packed = tmp_path / "v.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_verdicts(packed, table, NAMES).identity() == found.identity()
    other = written(tmp_path / "w.jsonl", line(table, one))
    assert read_verdicts(other, table, NAMES).identity() != found.identity()
    silent = written(tmp_path / "s.jsonl", line(table, one), line(table, two, names={}, background=0))
    assert read_verdicts(silent, table, NAMES).identity() == read_verdicts(other, table, NAMES).identity()


def test_boxes_are_met_within_a_pixel_and_cut_to_the_image(table: BoxTable, tmp_path: Path) -> None:
    row = rows_of(table)[0]
    x, y, right, bottom = table.box[row].tolist()
    near = [x + 0.9, y - 0.9, right - x, bottom - y]
    found = read_verdicts(written(tmp_path / "v", line(table, row, bbox=near)), table, NAMES)
    assert np.flatnonzero(np.diff(found.offset)).tolist() == [row]
    with pytest.raises(HdovdError, match="has no proposal at"):
        read_verdicts(written(tmp_path / "v", line(table, row, bbox=[x + 1.2, *near[1:]])), table, NAMES)
    box = table.box.copy()
    image = int(np.searchsorted(table.offset, row, "right")) - 1
    box[row] = [x, y, *table.image_size[image]]
    cut = BoxTable(**{name: getattr(table, name) for name in table.__slots__} | {"box": box})
    assert read_verdicts(written(tmp_path / "v", line(table, row, bbox=[x, y, 9000, 9000])), cut, NAMES).offset[-1] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[1]", "line 2 is a list: expected {"),
        ("{", "line 2 is no JSON"),
        ('{"names": {"key": 1}}', "line 2: image_id"),
        ({"image_id": 10**9}, "line 2: image 1000000000 is not in the training set"),
        ({"bbox": [0, 0, 3]}, "line 2: bbox is a list, expected [x, y, width, height]"),
        ({"bbox": [0, 0, "nan", 3]}, "has no proposal at"),
        ({"bbox": [0, 0, 3, 3]}, "elsewhere: verdicts have to be on the boxes of --proposals"),
        ({"row": -1}, "line 2: row -1 is no proposal of the"),
        ({"row": 0}, "line 2: row 0 is no proposal of the"),
        ({"row": 10**9}, "line 2: row 1000000000 is no proposal"),
        ({"names": None}, "line 2: names is null, expected a score for each name"),
        ({"names": ["key"]}, "line 2: names is a list"),
        ({"names": {"key": None}}, "the score of 'key' is null"),
        ({"names": {"key": True}}, "the score of 'key' is true"),
        ({"names": {"key": -0.1, "zeppelin": 1}}, "the score of 'key' is -0.1"),
        ({"names": {"key": float("nan")}}, "the score of 'key' is nan"),
        ({"others": 10**400}, "the score of 'others' is a number of more"),
        ({"others": "0.1"}, "the score of 'others' is the text"),
        ({"background": [0.1]}, "the score of 'background' is a list"),
        ({"background": -1}, "the score of 'background' is -1"),
        ({"names": {"key": 0}}, "line 2: no name has a score above 0"),
        ({}, "line 3: a second verdict on the same proposal"),
    ],
)
def test_bad_lines_are_told_by_number(table: BoxTable, tmp_path: Path, change: dict[str, Any] | str, said: str) -> None:
    one, two, *_ = rows_of(table)
    bad = change if isinstance(change, str) else line(table, two, **change)
    file = written(tmp_path / "v.jsonl", line(table, one), bad, line(table, two))
    with pytest.raises(HdovdError) as error:
        read_verdicts(file, table, NAMES)
    assert str(file) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_is_that_of_its_box(table: BoxTable, tmp_path: Path) -> None:
    """Crops of one set are not answers about another one, whose rows have moved."""
    one, two, *_ = rows_of(table)
    file = written(tmp_path / "v.jsonl", line(table, two, row=two), line(table, one, row=one, names={}))
    assert np.flatnonzero(np.diff(read_verdicts(file, table, NAMES).offset)).tolist() == [two]
    with pytest.raises(HdovdError, match=f"line 1: row {one} is another proposal than its bbox"):
        read_verdicts(written(file, line(table, two, row=one)), table, NAMES)


def test_a_file_without_a_known_name(table: BoxTable, tmp_path: Path) -> None:
    file = written(tmp_path / "v.jsonl", line(table, rows_of(table)[0], names={"spaceship": 1}))
    with pytest.raises(HdovdError, match=r"names no proposal by a noun of the vocabulary \(3 nouns, such as key"):
        read_verdicts(file, table, NAMES)
    (tmp_path / "v.jsonl").write_bytes(b"\x1f\x8b\x08damaged")
    with pytest.raises(HdovdError, match="is damaged"):
        read_verdicts(file, table, NAMES)


def test_labels_are_named_by_both(copied_cache: Path, extraction: Config, table: BoxTable, tmp_path: Path) -> None:
    """The rank of a noun is its cosine, what a mention adds, and the temperature times the verdict's log share."""
    rows = rows_of(table)[::2]
    names = FeatureCache(copied_cache).names(Level.NOUN)
    free = [name for name in names if name not in BASE]
    said = {row: {free[k % len(free)]: 0.9, free[(k + 1) % len(free)]: 0.3, BASE[0]: 1.0} for k, row in enumerate(rows)}
    file = written(tmp_path / "v.jsonl", *(line(table, row, names=said[row]) for row in rows))
    lines = list[str]()
    with lines_to(lines.append):
        report = extract_clip(extraction(copied_cache, verdicts=file, features="both"))
    assert report.levels[Level.INSTANCE] == "hit"
    assert report.levels[Level.PSEUDO_LABEL] == "extract"
    alone, both = FeatureCache(copied_cache), FeatureCache(copied_cache, "both")
    known = both.key_inputs(Level.PSEUDO_LABEL)["verdicts"]
    texts = torch.from_numpy(both.embeddings(Level.NOUN)).double()
    was, now = (one.rows_between(0, len(table.box)) for one in (alone, both))
    assert (was.noun != now.noun).any()
    mention, barred = (both.key_inputs(Level.PSEUDO_LABEL)[key] for key in ("mention", "barred"))
    offered = load_nouns(extraction(copied_cache))
    for row in rows_of(table):
        image = int(table.image_id[np.searchsorted(table.offset, row, "right") - 1])
        crop = torch.from_numpy(now.embedding[row]).double()
        rank = torch.nn.functional.cosine_similarity(texts, crop[None], dim=1)
        rank[list(offered.get(image, ()))] += mention
        if row in said:
            shares = {name: math.log(score / 1.0) for name, score in said[row].items()}  # a base name is the best one
            rank += known["temperature"] * torch.tensor(
                [shares.get(name, 0.0 if name in GROUNDS else math.log(FLOOR)) for name in names]
            )
        rank[list(barred)] = -math.inf
        best = names[int(rank.argmax())] if now.noun[row] < 0 else names[now.noun[row]]
        assert rank[names.index(best)] == pytest.approx(float(rank.max()), abs=1e-4)
        assert (now.noun[row] < 0) == (best in GROUNDS)
        if row not in said:
            assert now.noun[row] == was.noun[row]
    assert both.set.proposals["verdicts"] == {"file": "v.jsonl", "sha256": hash_file(file)}
    assert f"--verdicts {file}" in extract_command(copied_cache, "both", both.set.made_from)
    again = ExtractConfig.from_dict(both.set.made_from, copied_cache, device="cpu")
    assert again.verdicts == file
    assert set(extract_clip(again).levels.values()) == {"hit"}
    assert FeatureCache(copied_cache, "both").key_inputs(Level.PSEUDO_LABEL) != alone.key_inputs(Level.PSEUDO_LABEL)


def load_nouns(config: ExtractConfig) -> dict[int, tuple[int, ...]]:
    from hdovd.pipelines.nouns.allowed import offered_nouns

    nouns = offered_nouns(config.nouns, config.vocabulary, config.captions)
    assert nouns is not None
    assert nouns.by_image is not None
    return nouns.by_image


def test_verdicts_need_nouns_and_a_file(extraction: Config, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="--verdicts are of pseudo labels"):
        extraction(tmp_path / "c", verdicts=tmp_path / "v", vocabulary=None, captions=None)
    with pytest.raises(HdovdError, match="--verdicts: no file "):
        extract_clip(extraction(tmp_path / "c", verdicts=tmp_path / "v"))


def test_a_set_without_verdicts_says_nothing_of_them(extraction: Config, cache: Path, tmp_path: Path) -> None:
    """Sets of before there were any stay the same."""
    assert "verdicts" not in extraction(tmp_path / "c").to_dict()
    assert "verdicts" not in FeatureCache(cache).key_inputs(Level.PSEUDO_LABEL)


def test_crops_are_asked_about_and_answered(cache: Path, extraction: Config, table: BoxTable, tmp_path: Path) -> None:
    """Every proposal has a crop that shows it, and a line; the lines are verdicts."""
    lines, out = list[str](), tmp_path / "out"
    with lines_to(lines.append):
        export_crops(ExportConfig(cache=cache, to=ExportForm.CROPS, out=out))
    told = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [one["row"] for one in told] == rows_of(table)
    assert lines[-1:] == [f"wrote questions.jsonl, and {len(told)} crops to {out}/crops"]
    rows = FeatureCache(cache).rows_between(0, len(table.box))
    names = FeatureCache(cache).names(Level.NOUN)
    split = extraction(tmp_path).data.load("train2017", load_protocol(extraction(tmp_path).protocol), base_only=True)
    images = {image.id: image for image in split.images}
    for one in told[::7]:
        image, box = images[one["image_id"]], table.box[one["row"]]
        noun = rows.noun[one["row"]]
        assert one == line(table, one["row"], row=one["row"], names={names[noun]: 1.0} if noun >= 0 else {})
        with Image.open(split.path(image)) as picture, Image.open(out / "crops" / f"{one['row']}.jpg") as crop:
            grown = box + 0.1 * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
            wide = np.minimum(np.ceil(grown[2:]), picture.size) - np.maximum(np.floor(grown[:2]), 0)
            assert np.abs(np.array(crop.size) - wide).max() <= 1
            shown = np.asarray(crop.convert("RGB"), float)
            left, top = np.maximum(np.floor(grown[:2]), 0).astype(int).tolist()
            there = np.asarray(picture.convert("RGB"), float)[top : top + len(shown), left : left + shown.shape[1]]
            assert np.abs(shown - there).mean() < 12  # JPEG's
    answered = read_verdicts(out / "questions.jsonl", table, names).offset[-1]
    assert answered == sum(bool(one["names"]) for one in told) < len(told)  # others have no label, and wait
    export_crops(ExportConfig(cache=cache, to=ExportForm.CROPS, out=out))  # once more: it may have been killed
    with pytest.raises(HdovdError, match="expected a folder on this machine"):
        export_crops(ExportConfig(cache=cache, to=ExportForm.CROPS, out="s3://bucket/crops"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(HdovdError, match="holds no crops, but other things"):
        export_crops(ExportConfig(cache=cache, to=ExportForm.CROPS, out=tmp_path / "mine"))
