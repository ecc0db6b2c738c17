"""AP by both engines at a small size: the made-up world is what it should be, both are measured and compared."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_eval import EvalBench, bench_eval, largest_difference, make_eval_world

from hdovd.core import HdovdError
from hdovd.data import Protocol, load_protocol, load_split
from hdovd.evaluation import Engine
from hdovd.evaluation.coco import AveragePrecision

OV_COCO = load_protocol("ov-coco")


def _made(folder: Path, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    detections = make_eval_world(
        EvalBench(images=60, objects=400, detections=20, seed=seed), OV_COCO, folder / "instances.json"
    )
    return json.loads((folder / "instances.json").read_text()), detections


def test_the_world_is_coco_like_and_made_by_its_seed(tmp_path: Path) -> None:
    tree, detections = _made(tmp_path)
    split = load_split(tmp_path / "instances.json", tmp_path, OV_COCO, base_only=False)
    assert split.skips.lines() == []  # every object counts
    assert sum(len(image.labels) for image in split.images) == len(tree["annotations"]) == 400
    assert {d["image_id"] for d in detections} == {i["id"] for i in tree["images"]} == set(range(1, 61))
    assert len(detections) == 60 * 20
    assert {d["category_id"] for d in detections} <= set(range(1, 66))
    counts = np.bincount([a["category_id"] for a in tree["annotations"]], minlength=66)[1:]
    assert counts.max() > 5 * np.median(counts)
    assert len({d["score"] for d in detections}) < len(detections)  # some are equal
    assert any(a["iscrowd"] for a in tree["annotations"])
    assert _made(tmp_path) == (tree, detections)
    assert _made(tmp_path, seed=1)[1] != detections


def test_both_engines_are_measured_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench_eval(tmp_path, EvalBench(images=60, objects=400, detections=20, rounds=2))
    assert largest_difference(list(found.values())) <= 1e-6
    means = found[Engine.PYCOCOTOOLS].summary()
    ap50, ap = means["ap50"]["all"], means["ap"]["all"]
    assert ap50 is not None
    assert ap is not None
    assert 5 < ap50 < 95  # neither all nor none is found
    assert 0 < ap < ap50
    said = capsys.readouterr().out
    assert "60 images, 65 classes, 400 objects, 1,200 detections" in said
    for word in (
        r"pycocotools [\d.]+ +[\d.]+ s +[\d.]+ s +[\d.]+ GB$",
        r"faster-coco-eval [\d.]+ +[\d.]+ s +[\d.]+ s +[\d.]+ GB$",
        r"faster-coco-eval evaluates [\d.]+ times as fast as pycocotools; largest difference",
    ):
        assert re.search(word, said, re.M), said


def test_a_missing_engine_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(HdovdError, match=r"pip install 'hdovd\[fast-eval\]'"):
        bench_eval(tmp_path, EvalBench())
    assert not any(tmp_path.iterdir())


def test_the_largest_difference() -> None:
    protocol = Protocol("mine", ("a", "b"), ("c",))
    nan = float("nan")
    one = AveragePrecision(protocol, np.array([10.0, 20.0, nan]), np.array([5.0, 6.0, nan]))
    two = AveragePrecision(protocol, np.array([10.5, 20.0, nan]), np.array([5.0, 4.0, nan]))
    three = AveragePrecision(protocol, np.array([10.0, 20.0, 1.0]), np.array([5.0, 6.0, 1.0]))
    assert largest_difference([one, one]) == 0
    assert largest_difference([one, one, two]) == 2.0
    assert largest_difference([one, three]) == float("inf")
