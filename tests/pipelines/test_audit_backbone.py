"""The leak report of a run's first weights: what the backbone started from, as its file says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hdovd.coco import DataPaths
from hdovd.config import Recipe
from hdovd.pipelines.audit import AuditConfig, audit
from hdovd.pipelines.audit_report import AuditReport, Check, Verdict
from hdovd.pipelines.demo.world import BASE

MADE_BY = {"detector": "oln", "protocol": {"name": "demo-world", "base": list(BASE)}, "training_boxes": dict.fromkeys(BASE, 5)}
TRAIN, VAL = "instances_train2017.json", "instances_val2017.json"


def _silent(_: str) -> None: ...


def _audit(root: Path, cache: Path, **changes: Any) -> AuditReport:
    return audit(AuditConfig(DataPaths(root), cache, **({"protocol": str(root / "protocol.toml")} | changes)), _silent)


def _check(report: AuditReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


def _made_by(world: Path, file: str = TRAIN, **changes: Any) -> dict[str, Any]:
    """The record of a network that was trained on an annotation file of the world."""
    path = world / "annotations" / file
    return MADE_BY | {"annotations": {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}} | changes


def _leak(report: AuditReport, name: str) -> str:
    """All that the one leaking check says."""
    assert [check.name for check in report.checks if check.verdict is Verdict.LEAK] == [name]
    check = _check(report, name)
    return "\n".join((check.text, *check.details))


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
        save_file({"conv1.weight": torch.zeros(2)}, path, {"made_by": made_by if isinstance(made_by, str) else json.dumps(made_by)})
    text = (run / "config.toml").read_text()
    assert 'weights = "none"' in text
    (run / "config.toml").write_text(text.replace('weights = "none"', f'weights = "{path}"'))
    return path


def test_a_backbone_that_saw_novel_boxes(world: Path, cache: Path, run: Path) -> None:
    _weights(run, "b.safetensors", _made_by(world, training_boxes={"anchor": 3, "star": 12}))
    assert "trained on 12 boxes of 'star', which is novel" in _leak(_audit(world, cache, run=run), "run: backbone")


def test_a_backbone_that_saw_test_pictures(world: Path, cache: Path, run: Path) -> None:
    _weights(run, "b.safetensors", _made_by(world, VAL))
    assert "those are the test pictures" in _leak(_audit(world, cache, run=run), "run: backbone")


def test_a_backbone_with_an_honest_record(world: Path, cache: Path, run: Path) -> None:
    file = _weights(run, "b.safetensors", _made_by(world))
    check = _check(_audit(world, cache, run=run), "run: backbone")
    assert (check.verdict, check.text) == (Verdict.OK, f"{file}: oln trained on {5 * len(BASE)} boxes, all of base classes")


@pytest.mark.parametrize(("made_by", "words"), [(None, "is not here"), ("not json", "does not say what made it"),
                                                ("[]", "does not say what made it"), ("{}", "3 findings")])
def test_a_backbone_that_says_too_little_is_unknown(world: Path, cache: Path, run: Path, made_by: Any, words: str) -> None:
    _weights(run, "b.safetensors", made_by)
    check = _check(_audit(world, cache, run=run), "run: backbone")
    assert check.verdict is Verdict.UNKNOWN
    assert re.search(words, check.text)


def test_a_backbone_without_a_record_or_of_a_run_without_settings(world: Path, cache: Path, run: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2)}, _weights(run, "b.pth"))
    assert "b.pth, which does not say what made it" in _check(_audit(world, cache, run=run), "run: backbone").text
    (run / "config.toml").unlink()
    check = _check(_audit(world, cache, run=run), "run: backbone")
    assert (check.verdict, "does not say what the backbone started from" in check.text) == (Verdict.UNKNOWN, True)


@pytest.mark.parametrize(("name", "weights", "verdict", "words"), [
    ("resnet50", "auto", Verdict.OK, "the weights that torchvision publishes"), ("resnet-tiny", "none", Verdict.OK, "random weights"),
    ("timm:resnet18", "auto", Verdict.OK, "the weights that timm publishes"),
    ("mine:plain", "none", Verdict.UNKNOWN, "code outside of hdovd")])
def test_a_backbone_without_a_file(world: Path, cache: Path, run: Path, name: str, weights: str, verdict: Verdict, words: str) -> None:
    (run / "config.toml").write_text(f'[detector.backbone]\nname = "{name}"\nweights = "{weights}"\n')
    check = _check(_audit(world, cache, run=run), "run: backbone")
    assert (check.verdict, words in check.text) == (verdict, True)
