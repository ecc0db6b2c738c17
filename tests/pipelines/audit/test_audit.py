"""The leak report: an honest cache passes, and one planted leak of each kind is found, named and ends in exit code
1."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_scenes import MADE_BY, TRAIN, VAL, check_of, edit, leak_of, made_by_training, report_of

from hdovd.cache import Catalog, Level
from hdovd.cli.main import main
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, Skips, load_protocol, read_instances
from hdovd.pipelines.audit.audit import AuditConfig, audit
from hdovd.pipelines.audit.checks import Verdict, class_of_noun
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.proposal_files.file import Proposals, read_table, usable_proposals, write_proposals

Extract = Callable[..., ExtractConfig]


@pytest.fixture
def run(tmp_path: Path, cache: Path, world: Path, micro_recipe: Callable[..., Recipe]) -> Path:
    """The record that a run over the cache leaves."""
    from hdovd.cache.reader import FeatureCache

    folder = tmp_path / "run"
    folder.mkdir()
    record = {
        "protocol": load_protocol(str(world / "protocol.toml")).to_dict(),
        "cache": FeatureCache(cache).identity(),
        "resumed": [],
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(micro_recipe().to_toml())
    return folder


@pytest.fixture
def documented(
    copied_cache: Path, extraction: Extract, proposals: Path, tmp_path: Path, world: Path
) -> Callable[..., Path]:
    """The cache with a record of what made its proposals."""

    def write(made_by: dict[str, Any]) -> Path:
        write_proposals(tmp_path / "p.npz", read_table(proposals).by_image(), made_by)
        extract_clip(extraction(copied_cache, proposals=tmp_path / "p.npz"))
        return copied_cache

    return write


# --- an honest cache ---


def test_an_honest_cache_and_run_pass(world: Path, documented: Callable[..., Path], run: Path) -> None:
    report = report_of(world, documented(made_by_training(world)), run=run)
    assert [check.verdict for check in report.checks] == [Verdict.OK] * 9 + [Verdict.REPORT] * 2
    assert report.lines()[-1] == "no leak found"
    assert check_of(report, "calibration").text.startswith("no calibration recorded")


def test_what_cannot_be_checked_is_said(world: Path, cache: Path) -> None:
    report = report_of(world, cache)
    assert report.leaks == 0
    assert [c.name for c in report.checks if c.verdict is Verdict.UNKNOWN] == [
        "proposals: made by",
        "run: cache",
        "run: boxes",
        "run: backbone",
        "calibration",
    ]
    assert "5 of 11 checks could not be made" in report.lines()[-1]


def test_nothing_is_written(world: Path, cache: Path, untouched: Callable[[Path], Any], run: Path) -> None:
    with untouched(cache), untouched(world), untouched(run):
        report_of(world, cache, run=run)


def test_command_line_and_json(
    world: Path,
    cache: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(root: Path) -> int:
        words = [
            "--data",
            root,
            "--protocol",
            root / "protocol.toml",
            "--cache",
            cache,
            "--run",
            run,
            "--json",
            tmp_path / "out" / "a.json",
        ]
        monkeypatch.setattr(sys, "argv", ["hdovd", "audit", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert command(world) == 0
    assert "ok       base boxes" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "a.json").read_text())["leaks"] == 0
    edit(run / "run.json", lambda tree: tree["protocol"]["base"].append("star"))
    assert command(world) == 1
    assert "LEAK     class lists" in capsys.readouterr().out
    tree = json.loads((tmp_path / "out" / "a.json").read_text())
    assert [c["name"] for c in tree["checks"] if c["verdict"] == "LEAK"] == ["class lists"]
    assert set(tree["levels"]) == set(map(str, Level))


# --- planted leaks: the class lists ---


def test_class_lists_of_the_cache_and_the_protocol(world: Path, cache: Path, tmp_path: Path) -> None:
    text = (world / "protocol.toml").read_text().replace('"umbrella"]', '"umbrella"]\n').replace(', "star"', "")
    (tmp_path / "p.toml").write_text(text)
    found = leak_of(report_of(world, cache, protocol=str(tmp_path / "p.toml")), "class lists")
    assert "the cache has text embeddings of 'star'" in found


def test_a_run_of_another_split(world: Path, cache: Path, run: Path) -> None:
    def promote(record: dict[str, Any]) -> None:
        record["protocol"]["novel"].remove("star")
        record["protocol"]["base"].append("star")

    edit(run / "run.json", promote)
    text = leak_of(report_of(world, cache, run=run), "class lists")
    assert "run.json has 'star' as base, protocol demo-world has not" in text


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"oracle": True}, "is an oracle: trained on the boxes of novel classes too"),
        ({"init": {"run": "/other", "sha256": "0", "oracle": True}}, "/other, whose weights"),
    ],
)
def test_an_oracle_and_what_began_with_its_weights(
    world: Path, cache: Path, run: Path, record: dict[str, Any], words: str
) -> None:
    edit(run / "run.json", lambda tree: tree.update(record))
    assert words in leak_of(report_of(world, cache, run=run), "run: boxes")


def test_a_protocol_that_calls_all_classes_base_does_not_pass(
    world: Path, cache: Path, run: Path, tmp_path: Path
) -> None:
    """An oracle by hand: its own protocol has nothing to say of what was held back."""
    own = load_protocol(str(world / "protocol.toml")).all_base().to_dict()
    (tmp_path / "p.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items()))
    edit(run / "run.json", lambda tree: tree.update(protocol=own))
    check = check_of(report_of(world, cache, run=run, protocol=str(tmp_path / "p.toml")), "class lists")
    assert check.verdict is Verdict.UNKNOWN
    assert "holds no class back as novel" in check.text
    assert "has 'umbrella' as base" in leak_of(report_of(world, cache, run=run), "class lists")


def test_lists_under_the_name_of_a_shipped_protocol(world: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text((world / "protocol.toml").read_text().replace('"demo-world"', '"ov-coco"'))
    text = leak_of(report_of(world, cache, protocol=str(tmp_path / "p.toml")), "class lists")
    assert "calls itself ov-coco, has 'anchor' as base" in text


# --- planted leaks: proposals ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training_boxes": {"anchor": 3, "star": 12}}, "trained on 12 boxes of 'star', which is novel"),
        ({"protocol": {"name": "mine", "base": [*BASE, "key"]}}, "its protocol has 'key' as base"),
    ],
)
def test_proposals_of_a_network_that_saw_novel_boxes(
    world: Path, documented: Callable[..., Path], change: Any, words: str
) -> None:
    assert words in leak_of(report_of(world, documented(made_by_training(world) | change)), "proposals: made by")


def test_proposals_of_a_network_that_saw_test_pictures(
    world: Path, documented: Callable[..., Path], tmp_path: Path
) -> None:
    cache = documented(made_by_training(world, VAL))
    assert "instances_val2017.json: those are the test pictures" in leak_of(
        report_of(world, cache), "proposals: made by"
    )
    elsewhere = AuditConfig(
        data=DataPaths(images=world / "train2017", annotations=world / "annotations" / TRAIN),
        cache=cache,
        protocol=str(world / "protocol.toml"),
    )
    check = check_of(audit(elsewhere), "proposals: made by")  # no validation file to compare with
    assert check.verdict is Verdict.UNKNOWN
    assert "give that file with --annotations" in check.text


@pytest.mark.parametrize(
    "annotations", [{"file": "mine.json", "sha256": "ab" * 32}, {"file": "mine.json"}, "mine.json"]
)
def test_proposals_of_a_network_of_another_annotation_file(
    world: Path, documented: Callable[..., Path], annotations: Any
) -> None:
    check = check_of(
        report_of(world, documented(made_by_training(world, annotations=annotations))), "proposals: made by"
    )
    assert check.verdict is Verdict.UNKNOWN
    assert "annotation" in check.text


@pytest.mark.parametrize(
    "made_by", [{"detector": "mine"}, MADE_BY | {"training_boxes": "many"}, MADE_BY | {"protocol": "ov-coco"}]
)
def test_a_record_that_says_too_little_is_unknown(
    world: Path, documented: Callable[..., Path], made_by: dict[str, Any]
) -> None:
    check = check_of(report_of(world, documented(made_by)), "proposals: made by")
    assert check.verdict is Verdict.UNKNOWN


def test_the_file_speaks_for_a_cache_that_does_not(world: Path, cache: Path, proposals: Path, tmp_path: Path) -> None:
    found = read_table(proposals).by_image()
    write_proposals(tmp_path / "p.npz", found, made_by_training(world))
    report = report_of(world, cache, proposals=tmp_path / "p.npz")
    assert (
        check_of(report, "proposals: made by").verdict is check_of(report, "proposals: the file").verdict is Verdict.OK
    )
    write_proposals(tmp_path / "p.npz", found, MADE_BY | {"training_boxes": {"fish": 1}})
    assert "'fish', which is novel" in leak_of(
        report_of(world, cache, proposals=tmp_path / "p.npz"), "proposals: made by"
    )
    image_id = next(iter(found))
    found[image_id] = Proposals(found[image_id].boxes[:-1], found[image_id].scores[:-1])
    write_proposals(tmp_path / "p.npz", found, MADE_BY)
    assert (
        check_of(report_of(world, cache, proposals=tmp_path / "p.npz"), "proposals: the file").verdict
        is Verdict.UNKNOWN
    )


def _planted(world: Path, proposals: Path, share: float, move: float = 0.0) -> dict[int, Proposals]:
    """The proposals, a share of those near novel objects exchanged for the annotations themselves, `move` px off."""
    split = DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True)
    found = usable_proposals(read_table(proposals), proposals, split.images, Skips())
    truth, rng = read_instances(world / "annotations" / "instances_train2017.json"), np.random.default_rng(0)
    novel = np.flatnonzero(~truth.of_classes(BASE))
    for image_id, own in found.items():
        for row in novel[truth.image_ids[novel] == image_id]:
            if rng.uniform() < share:
                own.boxes[np.abs(own.boxes - truth.corners[row]).sum(1).argmin()] = truth.corners[row] + np.float32(
                    move
                )
    return found


def test_proposals_made_from_the_ground_truth(
    world: Path, proposals: Path, extraction: Extract, tmp_path: Path
) -> None:
    write_proposals(tmp_path / "p.json", _planted(world, proposals, 0.3))
    extract_clip(extraction(tmp_path / "c", proposals=tmp_path / "p.json"))
    report = report_of(world, tmp_path / "c")
    text = leak_of(report, "proposals: copies")
    assert "made from the annotations" in text
    assert "annotation" in text.split("\n")[1]
    assert check_of(report, "proposals: copies").numbers["copies"] >= 3


def test_boxes_in_whole_pixels_are_not_taken_for_copies(
    world: Path, proposals: Path, extraction: Extract, tmp_path: Path
) -> None:
    """A detector that answers in whole pixels is often a pixel off, and so hits whole-pixel annotations now and
    then."""
    found, rng = _planted(world, proposals, 1.0), np.random.default_rng(1)
    for own in found.values():
        own.boxes[:] = own.boxes.round() + rng.choice([-1, 0, 0, 1], own.boxes.shape)
    write_proposals(tmp_path / "p.json", found)
    extract_clip(extraction(tmp_path / "c", proposals=tmp_path / "p.json"))
    check = check_of(report_of(world, tmp_path / "c"), "proposals: copies")
    assert check.verdict is Verdict.OK
    assert check.numbers["chance"] > 0


# --- planted leaks: the run ---


def test_a_run_of_another_cache_was_not_audited(world: Path, cache: Path, run: Path) -> None:
    edit(run / "run.json", lambda tree: tree["cache"]["levels"]["instance"].update(key="abc"))
    report = report_of(world, cache, run=run)
    check = check_of(report, "run: cache")
    assert (report.leaks, check.verdict) == (0, Verdict.UNKNOWN)
    assert (
        "trained on instance abc, this set has " + Catalog(cache).sets()["default"].levels[Level.INSTANCE] in check.text
    )
    assert f"audit {cache}" in check.text


def test_a_calibration_on_novel_names(world: Path, cache: Path, run: Path) -> None:
    levels = Catalog(cache).sets()["default"].levels
    fitted_on = {"classes": [*BASE], "levels": {"instance": levels[Level.INSTANCE], "class": levels[Level.CLASS]}}
    edit(
        run / "run.json",
        lambda tree: tree.update(reliability={"centre": 0.2, "source": "calibration c.toml", "fitted_on": fitted_on}),
    )
    assert check_of(report_of(world, cache, run=run), "calibration").verdict is Verdict.OK
    edit(run / "run.json", lambda tree: tree["reliability"]["fitted_on"]["classes"].append("fish"))
    assert "fitted on the name 'fish', which is novel" in leak_of(report_of(world, cache, run=run), "calibration")


@pytest.mark.parametrize(
    "record",
    [
        3,
        {"centre": 1},
        {"source": "calibration c.toml"},
        {"fitted_on": {"classes": [*BASE]}},
        {"fitted_on": {"classes": [*BASE], "levels": {"instance": "a", "class": "b"}}},
    ],
)
def test_a_calibration_that_says_too_little_is_unknown(world: Path, cache: Path, run: Path, record: Any) -> None:
    edit(run / "run.json", lambda tree: tree.update(reliability=record))
    assert check_of(report_of(world, cache, run=run), "calibration").verdict is Verdict.UNKNOWN


def test_weights_that_are_the_recipe_s(world: Path, cache: Path, run: Path) -> None:
    edit(run / "run.json", lambda tree: tree.update(reliability={"centre": 0.25, "source": "the recipe"}))
    check = check_of(report_of(world, cache, run=run), "calibration")
    assert check.verdict is Verdict.REPORT
    assert "who chose them, and by what, is not recorded" in check.text


def test_no_run_there(world: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"--run: no file .*run\.json"):
        report_of(world, cache, run=tmp_path)


# --- reports ---


def test_novel_names_are_counted_as_the_pseudo_labels_have_them(world: Path, cache: Path) -> None:
    from hdovd.cache.reader import FeatureCache

    reader = FeatureCache(cache)
    nouns, novel = reader.names(Level.NOUN), load_protocol(str(world / "protocol.toml")).novel
    images = json.loads((world / "annotations" / "instances_train2017.json").read_text())["images"]
    wins = [
        nouns[row]
        for image in images
        if image["id"] in reader._rows_by_image(Level.BOXES)
        for row in reader.instances(image["id"]).proposals().noun
        if row >= 0
    ]
    numbers = check_of(report_of(world, cache), "novel names").numbers
    assert numbers["pseudo_labels"] == len(wins) > 0
    assert {name: entry["pseudo_labels"] for name, entry in numbers["won"].items()} == {
        n: wins.count(n) for n in nouns if n in novel
    }


def test_pseudo_boxes_on_novel_objects_by_a_plain_count(world: Path, cache: Path) -> None:
    from torchvision.ops import box_iou

    from hdovd.cache.reader import FeatureCache

    reader, truth = FeatureCache(cache), read_instances(world / "annotations" / "instances_train2017.json")
    novel, boxes, covered, right = ~truth.of_classes(BASE), 0, 0, 0
    nouns = [*reader.names(Level.NOUN), ""]
    for image_id in reader._rows_by_image(Level.BOXES):
        own, rows = reader.instances(image_id).proposals(), np.flatnonzero(novel & (truth.image_ids == image_id))
        if len(rows) and len(own.box):
            overlap = box_iou(torch.from_numpy(own.box), torch.from_numpy(truth.corners[rows]))
            boxes, covered = boxes + int((overlap.amax(1) >= 0.5).sum()), covered + int((overlap.amax(0) >= 0.5).sum())
            right += sum(
                nouns[own.noun[k]] == truth.names[int(truth.categories[rows[best]])]
                for k, best in enumerate(overlap.argmax(1))
                if overlap[k, best] >= 0.5
            )
    found = check_of(report_of(world, cache), "pseudo boxes").numbers["by_class"].values()
    assert (boxes, covered, right) == tuple(
        sum(entry[name] for entry in found) for name in ("boxes", "covered", "right")
    )
    assert boxes > 20


@pytest.mark.parametrize(
    ("noun", "name"),
    [
        ("knives", "knife"),
        ("Knife", "knife"),
        ("buses", "bus"),
        ("cats", "cat"),
        ("key board", "keyboard"),
        ("ties", "tie"),
        ("sofas", "couch"),
        ("sofa", "couch"),
        ("tennis rackets", "tennis racket"),
        ("catfish", None),
        ("cup board", None),
        ("", None),
    ],
)
def test_forms_of_names(noun: str, name: str | None) -> None:
    classes = ("knife", "bus", "cat", "keyboard", "tie", "couch", "tennis racket", "cup")
    assert class_of_noun([noun], classes, {"couch": ["couch", "sofa"]}).get(0) == name


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, " is no COCO instances file"),
        ({"images": [], "annotations": [{"id": 1}], "categories": []}, ": annotation 1 lacks one of"),
        ({"images": [{"id": 1}], "annotations": [], "categories": []}, ": image 1: file_name is null, expected a name"),
    ],
)
def test_a_file_that_is_no_instances_file(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=rf"a\.json{message}"):
        read_instances(tmp_path / "a.json")
