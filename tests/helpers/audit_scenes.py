"""What the tests of the audit share: a report, a check of it, its one leak; records of what made a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdovd.data import DataPaths
from hdovd.pipelines.audit.audit import AuditConfig, AuditReport, audit
from hdovd.pipelines.audit.checks import Check, Verdict
from hdovd.pipelines.demo.world import BASE

MADE_BY = {
    "detector": "oln",
    "protocol": {"name": "demo-world", "base": list(BASE)},
    "training_boxes": dict.fromkeys(BASE, 5),
}
TRAIN, VAL = "instances_train2017.json", "instances_val2017.json"


def report_of(root: Path, cache: Path, **changes: Any) -> AuditReport:
    return audit(
        AuditConfig(data=DataPaths(root), cache=cache, **({"protocol": str(root / "protocol.toml")} | changes))
    )


def check_of(report: AuditReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


def leak_of(report: AuditReport, name: str) -> str:
    """All that the one leaking check says."""
    assert [check.name for check in report.checks if check.verdict is Verdict.LEAK] == [name]
    check = check_of(report, name)
    return "\n".join((check.text, *check.details))


def made_by_training(world: Path, file: str = TRAIN, **changes: Any) -> dict[str, Any]:
    """The record of a network that was trained on an annotation file of the world."""
    path = world / "annotations" / file
    return (
        MADE_BY
        | {"annotations": {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
        | changes
    )


def edit(file: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
