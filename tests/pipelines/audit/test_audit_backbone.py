"""The leak report of a run's first weights: what the backbone started from, as its file says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_scenes import VAL, check_of, leak_of, made_by_training, report_of
from safetensors.torch import save_file

from hdovd.config.recipe import Recipe
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.demo.world import BASE


@pytest.fixture
def run(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> Path:
    """A run of which nothing is known but its settings."""
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.toml").write_text(micro_recipe().to_toml())
    return tmp_path


def _weights(run: Path, file: str | Path, made_by: Any = None) -> Path:
    """Let the run have started from a file of backbone weights, with this record in it."""
    path = run / file
    if made_by is not None:
        save_file(
            {"conv1.weight": torch.zeros(2)},
            path,
            {"made_by": made_by if isinstance(made_by, str) else json.dumps(made_by)},
        )
    text = (run / "config.toml").read_text()
    assert 'weights = "none"' in text
    (run / "config.toml").write_text(text.replace('weights = "none"', f'weights = "{path}"'))
    return path


def test_a_backbone_that_saw_novel_boxes(world: Path, cache: Path, run: Path) -> None:
    _weights(run, "b.safetensors", made_by_training(world, training_boxes={"anchor": 3, "star": 12}))
    assert "trained on 12 boxes of 'star', which is novel" in leak_of(report_of(world, cache, run=run), "run: backbone")


def test_a_backbone_that_saw_test_pictures(world: Path, cache: Path, run: Path) -> None:
    _weights(run, "b.safetensors", made_by_training(world, VAL))
    assert "those are the test pictures" in leak_of(report_of(world, cache, run=run), "run: backbone")


def test_a_backbone_with_an_honest_record(world: Path, cache: Path, run: Path) -> None:
    file = _weights(run, "b.safetensors", made_by_training(world))
    check = check_of(report_of(world, cache, run=run), "run: backbone")
    assert (check.verdict, check.text) == (
        Verdict.OK,
        f"{file}: oln trained on {5 * len(BASE)} boxes, all of base classes",
    )


@pytest.mark.parametrize(
    ("made_by", "words"),
    [
        (None, "is not here"),
        ("not json", "does not say what made it"),
        ("[]", "does not say what made it"),
        ("{}", "3 findings"),
    ],
)
def test_a_backbone_that_says_too_little_is_unknown(
    world: Path, cache: Path, run: Path, made_by: Any, words: str
) -> None:
    _weights(run, "b.safetensors", made_by)
    check = check_of(report_of(world, cache, run=run), "run: backbone")
    assert check.verdict is Verdict.UNKNOWN
    assert re.search(words, check.text)


def test_a_backbone_without_a_record_or_of_a_run_without_settings(world: Path, cache: Path, run: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2)}, _weights(run, "b.pth"))
    assert "b.pth, which does not say what made it" in check_of(report_of(world, cache, run=run), "run: backbone").text
    (run / "config.toml").unlink()
    check = check_of(report_of(world, cache, run=run), "run: backbone")
    assert (check.verdict, "does not say what the backbone started from" in check.text) == (Verdict.UNKNOWN, True)


@pytest.mark.parametrize(
    ("name", "weights", "verdict", "words"),
    [
        ("resnet50", "auto", Verdict.OK, "the weights that torchvision publishes"),
        ("resnet-tiny", "none", Verdict.OK, "random weights"),
        ("timm:resnet18", "auto", Verdict.OK, "the weights that timm publishes"),
        ("mine:plain", "none", Verdict.UNKNOWN, "code outside of hdovd"),
    ],
)
def test_a_backbone_without_a_file(
    world: Path, cache: Path, run: Path, name: str, weights: str, verdict: Verdict, words: str
) -> None:
    (run / "config.toml").write_text(f'[detector.backbone]\nname = "{name}"\nweights = "{weights}"\n')
    check = check_of(report_of(world, cache, run=run), "run: backbone")
    assert (check.verdict, words in check.text) == (verdict, True)


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("rtdetr_r18vd_5x_coco_objects365_from_paddle.pth", "coco"),
        ("fasterrcnn_resnet50_fpn_COCO-258fb6c6.pth", "COCO"),
        ("dfine_l_obj2coco_e25.pth", "coco"),
        ("d-fine_m_obj365.safetensors", "obj365"),
        ("faster_rcnn_r50_mscoco2017.pth", "mscoco"),
        ("ov-coco-backbone.pth", None),
        ("HD_OVD_coco.pth", None),
        ("resnet18_soco_o3650.pth", None),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_weights_that_are_named_as_of_a_detector_of_all_classes(
    world: Path, cache: Path, run: Path, file: str, data: str | None, here: bool
) -> None:
    path = _weights(run, file)
    if here:
        torch.save({"conv1.weight": torch.zeros(2)}, path)
    report = report_of(world, cache, run=run)
    if data is None:
        assert check_of(report, "run: backbone").verdict is Verdict.UNKNOWN
    else:
        assert f"{path} is named as weights of a detector that was trained on {data}," in leak_of(
            report, "run: backbone"
        )


def test_a_record_counts_for_more_than_a_name(world: Path, cache: Path, run: Path) -> None:
    _weights(run, "oln_coco.safetensors", made_by_training(world))
    assert check_of(report_of(world, cache, run=run), "run: backbone").verdict is Verdict.OK


def test_weights_of_the_runs_before_are_judged_by_their_names_too(world: Path, cache: Path, run: Path) -> None:
    last, middle = run / "last", run / "middle"
    for folder, before in ((last, middle), (middle, run)):
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"init": {"run": str(before)}}))
    (run / "run.json").write_text(json.dumps({"imported": {"file": "/there/rtdetr_r50vd_coco.pth"}}))
    assert "/there/rtdetr_r50vd_coco.pth is named as weights of a detector" in leak_of(
        report_of(world, cache, run=last), "run: backbone"
    )
    (run / "run.json").write_text(json.dumps({"init": {"run": str(last)}}))  # a circle, of folders that were used again
    assert check_of(report_of(world, cache, run=last), "run: backbone").verdict is Verdict.UNKNOWN
    (run / "run.json").write_text("[]")
    assert check_of(report_of(world, cache, run=last), "run: backbone").verdict is Verdict.UNKNOWN
