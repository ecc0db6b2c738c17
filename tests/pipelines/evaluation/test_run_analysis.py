"""A run taken apart: on detections made by hand around the micro world's objects, and on what does not belong
together."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol, load_split
from hdovd.evaluation.coco import GroundTruth
from hdovd.evaluation.tide import ERRORS, Kind
from hdovd.pipelines.evaluation.analysis import RunAnalysis, analyse
from hdovd.pipelines.evaluation.evaluate import EvalConfig, error_table, evaluate
from hdovd.pipelines.runs import RunFolder, weights_hash


@pytest.fixture(scope="module")
def made(distilled: RunFolder, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose detections are made by hand: of the objects of each image, in turn, found, misnamed, mislocalised and
    missed ones.
    """
    run = Path(shutil.copytree(distilled.path, tmp_path_factory.mktemp("made") / "run"))
    protocol = load_protocol(str(world / "protocol.toml"))
    split = load_split(world / "annotations" / "instances_val2017.json", world / "val2017", protocol, base_only=False)
    rows = []
    for number, image in enumerate(split.images):
        for place, (box, label) in enumerate(zip(image.boxes.tolist(), image.labels.tolist(), strict=True)):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            what = (number + place) % 4
            if what == 3:
                continue
            named = split.coco_ids[(label + 7) % len(split.coco_ids) if what == 1 else label]
            rows.append(
                {
                    "image_id": image.id,
                    "category_id": named,
                    "bbox": [x, y, w, h * 0.3 if what == 2 else h],
                    "score": round(0.9 - 0.05 * place - 0.01 * number, 3),
                }
            )
    ap = GroundTruth(split.annotations, split.coco_ids, [i.id for i in split.images], protocol).average_precision(rows)
    (run / "detections.json").write_text(json.dumps(rows))
    (run / "metrics.json").write_text(
        json.dumps(
            {
                "protocol": protocol.name,
                **ap.summary(),
                "per_class": ap.per_class(),
                "images": len(split.images),
                "weights": "last",
                "weights_hash": weights_hash(run / "model.safetensors"),
            }
        )
    )
    return run


@pytest.fixture(scope="module")
def analysis(made: Path, world: Path) -> RunAnalysis:
    return analyse(made, DataPaths(world))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_every_image_tells_what_became_of_its_detections_and_objects(analysis: RunAnalysis, made: Path) -> None:
    rows, kinds, fates = json.loads((made / "detections.json").read_text()), Counter[Kind](), Counter[Kind]()
    for place, image in enumerate(analysis.split.images):
        told = analysis.image(place)
        mine = sorted((row for row in rows if row["image_id"] == image.id), key=lambda row: -row["score"])
        assert told.image is image
        assert [d.score for d in told.detections] == [row["score"] for row in mine]
        for d, row in zip(told.detections, mine, strict=True):
            x, y, w, h = row["bbox"]
            assert d.box == (x, y, x + w, y + h)
            assert analysis.split.coco_ids[d.label] == row["category_id"]
            kinds[d.kind] += 1
            assert (d.truth is None) == (d.kind is Kind.BACKGROUND)
            if d.truth is not None:
                truth = told.truths[d.truth]
                assert (truth.label == d.label) == (d.kind in (Kind.RIGHT, Kind.LOCALISATION, Kind.DUPLICATE))
        np.testing.assert_allclose([t.box for t in told.truths], image.boxes, atol=1e-4)
        assert [t.label for t in told.truths] == image.labels.tolist()
        assert [t.annotation_id for t in told.truths] == image.annotation_ids.tolist()
        for k, t in enumerate(told.truths):
            fates[t.fate] += 1
            assert (t.detection is None) == (t.fate is Kind.MISSED)
            if t.detection is not None:
                by = told.detections[t.detection]
                assert (by.kind, by.truth) == (t.fate, k)
    every = analysis.errors.groups["all"]
    assert (kinds[Kind.RIGHT], fates[Kind.RIGHT], fates[Kind.MISSED]) == (
        every.found,
        every.found,
        every.counts[Kind.MISSED],
    )
    assert {kind: kinds[kind] for kind in ERRORS[:-1]} == {kind: every.counts[kind] for kind in ERRORS[:-1]}
    assert (
        min(every.found, *(fates[f] for f in (Kind.RIGHT, Kind.CLASSIFICATION, Kind.LOCALISATION, Kind.MISSED))) >= 3
    )  # all of them are there to be told


def test_the_parts_agree_with_metrics_and_with_each_other(analysis: RunAnalysis) -> None:
    stated = analysis.metrics
    assert {group: part.ap50 for group, part in analysis.errors.groups.items()} == pytest.approx(stated["ap50"])
    ap50 = dict(zip(analysis.protocol.names, analysis.curves.ap50().tolist(), strict=True))
    assert {n: v for n, v in ap50.items() if not np.isnan(v)} == pytest.approx(
        {n: v["ap50"] for n, v in stated["per_class"].items() if v["ap50"] is not None}
    )
    assert analysis.reliability["all"].counts.sum() == len(analysis.found.labels)
    assert (
        analysis.reliability["all"].counts == analysis.reliability["base"].counts + analysis.reliability["novel"].counts
    ).all()
    assert analysis.confusion.counts[:-1].sum() == len(analysis.objects.labels)
    assert (analysis.confusion.threshold, np.trace(analysis.confusion.counts)) == (
        0.3,
        analysis.errors.groups["all"].found,
    )


def test_its_tree_is_json(analysis: RunAnalysis) -> None:
    tree = json.loads(json.dumps(analysis.to_tree(), allow_nan=False))
    assert tree.keys() == {"run", "protocol", "weights", "metrics", "curves", "errors", "confusion", "reliability"}


def test_what_eval_wrote_can_be_taken_apart_and_says_the_same(
    distilled: RunFolder, world: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    shutil.copy(run / "model.safetensors", run / "best.safetensors")
    result = evaluate(EvalConfig(run=run, data=DataPaths(world), device="cpu"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["weights_hash"] == weights_hash(run / "model.safetensors")
    told = analyse(run, DataPaths(world))
    assert (
        json.loads(json.dumps(told.errors.to_tree()))
        == metrics["errors"]
        == json.loads(json.dumps(result.errors.to_tree()))
    )
    assert told.errors.groups["all"].false_positives > 50
    table = error_table(result.errors).splitlines()
    novel, base = (result.errors.groups[g].counts[Kind.CLASSIFICATION] for g in ("novel", "base"))
    row = next(line for line in table if line.startswith("classification ")).split()
    assert [row[1], row[3]] == [f"{novel:,d}", f"{base:,d}"]


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def _first(**changes: Any) -> Callable[[Path], None]:
    return lambda run: _edit(run / "detections.json", lambda rows: rows[3].update(changes))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not evaluated": (lambda run: (run / "metrics.json").unlink(), "no metrics.json: run hdovd eval"),
    "no detections": (lambda run: (run / "detections.json").unlink(), "no detections.json: run hdovd eval"),
    "trained on": (
        lambda run: shutil.copy(run / "class_embeddings.safetensors", run / "model.safetensors"),
        "trained on since; run hdovd eval",
    ),
    "best gone": (
        lambda run: (
            _edit(run / "metrics.json", lambda m: m.update(weights="best"))
            or (run / "best.safetensors").unlink(missing_ok=True)
        ),
        r"evaluated with its best weights, but has no best\.safetensors",
    ),
    "fewer images": (
        lambda run: _edit(run / "metrics.json", lambda m: m.update(images=7)),
        "was evaluated on 7 images, but .* has 8",
    ),
    "another AP": (
        lambda run: _edit(run / "detections.json", lambda rows: rows.pop(0)),
        "AP50 of .* but metrics.json states",
    ),
    "another image": (
        _first(image_id=77),
        r"entry 3 is \{'image_id': 77, .*expected an image and a class that .*instances_val2017\.json has",
    ),
    "another class": (_first(category_id=[]), "entry 3 is .*'category_id': \\[\\]"),
    "no box": (_first(bbox=[1, 2, 3]), "entry 3 is .*a bbox of four numbers"),
    "no score": (_first(score=float("nan")), "entry 3 is .*a score in 0"),
    "huge score": (_first(score=10**400), "entry 3 is .*a score in 0"),
    "huge box": (_first(bbox=[10**400, 1, 1, 1]), "entry 3 is .*a bbox of four numbers"),
    "text id": (_first(image_id="1"), "entry 3 is .*'image_id': '1'"),
    "no row": (lambda run: (run / "detections.json").write_text("[3]"), "entry 0 is 3: expected an image"),
    "no list": (lambda run: (run / "detections.json").write_text('{"a": [1]}'), "is no list of detections"),
    "metrics of something else": (lambda run: (run / "metrics.json").write_text("[]"), "not what hdovd eval writes"),
    "unknown weights": (
        lambda run: _edit(run / "metrics.json", lambda m: m.update(weights="mean")),
        "not what hdovd eval writes",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_what_does_not_belong_together(case: str, copied: Path, world: Path) -> None:
    damage, message = REFUSALS[case]
    damage(copied)
    with pytest.raises(HdovdError, match=message) as error:
        analyse(copied, DataPaths(world))
    assert str(copied) in str(error.value)


def test_an_evaluation_that_noted_no_hash_is_taken_if_it_is_younger_than_the_weights(copied: Path, world: Path) -> None:
    _edit(copied / "metrics.json", lambda metrics: metrics.pop("weights_hash"))
    os.utime(copied / "model.safetensors", (1, 1))
    assert analyse(copied, DataPaths(world)).errors.groups["all"].found > 0
