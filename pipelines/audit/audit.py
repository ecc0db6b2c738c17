"""The leak report that reviewers want: did anything learn from novel annotations, or from test pictures?

It compares what a cache and a run recorded with the raw annotation files, which it reads with all their classes.
docs/AUDIT.md says what each check means. It writes nothing into the cache or the run.
"""

import json
from pathlib import Path
from typing import Any

from hdovd.cache.identity import require_seal
from hdovd.cache.reader import FeatureCache
from hdovd.core.errors import HdovdError
from hdovd.core.log import log, quiet
from hdovd.core.text_files import read_json
from hdovd.data.coco import instances_file
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.pipelines.audit.config import AuditConfig
from hdovd.pipelines.audit.inputs import Audited, read_boxes, read_truth
from hdovd.pipelines.audit.proposals import (
    check_copies,
    check_made_by,
    check_same_proposals,
    report_names,
    report_pseudo_boxes,
)
from hdovd.pipelines.audit.report import AuditReport, Check
from hdovd.pipelines.audit.run import check_backbone, check_calibration, check_run_cache
from hdovd.pipelines.audit.split import check_base_rows, check_pictures, check_split_lists
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.proposal_files.file import read_table


def audit(config: AuditConfig) -> AuditReport:
    """All checks; the report goes to `log`. Raises HdovdError for input that cannot be read."""
    config.check()
    protocol = load_protocol(config.protocol)
    audited = _read(config, protocol)
    checks = [
        check_base_rows(audited),
        check_split_lists(audited),
        check_pictures(audited),
        *_proposal_checks(config, audited),
        check_copies(audited),
        check_run_cache(audited),
        check_backbone(audited),
        check_calibration(audited),
        report_names(audited),
        report_pseudo_boxes(audited),
    ]
    recorded = audited.cache.set.proposals
    about = {
        "cache": audited.cache.url,
        "set": config.features,
        "protocol": f"{protocol.name}, {len(protocol.base)} base and {len(protocol.novel)} novel classes",
        "annotations": str(audited.truth.file),
        "run": str(config.run or "none given"),
        "proposals": recorded.get("identity", "not recorded"),
    }
    report = AuditReport(about, tuple(checks))
    for line in report.lines():
        log(line)
    if config.json_out is not None:
        keys = {str(level): audited.cache.key(level) for level in audited.cache.levels()}
        tree = report.to_dict() | {"levels": keys, "annotations_sha256": audited.truth.sha256()}
        write_text(config.json_out, json.dumps(tree, indent=1))
    return report


def _read(config: AuditConfig, protocol: Protocol) -> Audited:
    data = config.data
    root, missing = data.root or Path(), {"run": "no --run was given: not checked"}
    folder = data.images or root / "train2017"
    truth = read_truth(data.annotation_file("train2017"), folder)
    if absent := [name for name in protocol.names if name not in truth.names.values()]:
        raise HdovdError(
            f"protocol {protocol.name} names classes that {truth.file} does not know: {', '.join(absent[:8])}. Give "
            f"the split that fits this data with --protocol"
        )
    val_file = instances_file(root, "val2017")
    if data.root is None or not val_file.is_file():
        missing["val"] = (
            f"no {val_file}: whether training and validation share pictures is not known"
            if data.root is not None
            else "no --data was given: where the validation pictures are is not known"
        )
    cache = FeatureCache(config.cache, config.features)
    return Audited(
        protocol,
        truth,
        folder,
        None if "val" in missing else read_truth(val_file, root / "val2017"),
        None if "val" in missing else root / "val2017",
        cache,
        read_boxes(cache),
        _read_run(config.run),
        config.run,
        missing,
    )


def _read_run(run: Path | None) -> dict[str, Any] | None:
    if run is None:
        return None
    tree = read_json(run / "run.json", "--run")
    if not isinstance(tree, dict):
        raise HdovdError(f"{run / 'run.json'} is damaged: expected the record that hdovd train writes")
    try:
        require_seal(tree)
    except ValueError as error:
        raise HdovdError(f"{run / 'run.json'}: {error}; what it says cannot be audited") from error
    return tree


def _proposal_checks(config: AuditConfig, audited: Audited) -> list[Check]:
    """Of the set's record and, where it was given, of the file."""
    recorded = audited.cache.set.proposals.get("made_by")
    if config.proposals is None:
        return [check_made_by(audited, recorded, "the cache's record of its proposals")]
    with quiet():
        split = config.data.load("train2017", audited.protocol, base_only=True)
    table = read_table(config.proposals, audited.truth.file)
    checks = [
        check_same_proposals(audited, table, split, str(config.proposals)),
        check_made_by(audited, table.made_by or None, str(config.proposals)),
    ]
    if recorded and recorded != table.made_by:
        checks.append(check_made_by(audited, recorded, "the cache's record of its proposals"))
    return checks
