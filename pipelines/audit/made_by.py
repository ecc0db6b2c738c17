"""What the audit asks of a record of how a network was made: which boxes, which classes, which annotation file.

Called by `audit_proposals` and `audit_run`. The records are those of `proposal_networks.provenance`, and may be a stranger's.
"""

from __future__ import annotations

from typing import Any

from hdovd.pipelines.audit.inputs import Audited
from hdovd.pipelines.audit.report import Findings


def judge_record(audited: Audited, made_by: dict[str, Any], whose: str, found: Findings) -> str:
    """Adds to `found` what the record says of other than base boxes of training pictures, and what it does not say.

    Args:
        whose: the record, in words.

    Returns:
        What to say where nothing was found.
    """
    protocol, total = audited.protocol, 0
    counts, base = made_by.get("training_boxes"), _base_names(made_by)
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        total = sum(counts.values())
        found.leaks += [f"{whose}: trained on {count:,d} boxes of {own!r}, which is {'novel' if own in protocol.novel else 'no base class'}"
                        for own, count in counts.items() if count and own not in protocol.base]
    else:
        found.unknown.append(f"{whose} does not say on how many boxes of which class (training_boxes)")
    if base is not None:
        found.leaks += [f"{whose}: its protocol has {own!r} as base, {protocol.name} has not" for own in base if own not in protocol.base]
    else:
        found.unknown.append(f"{whose} does not say which classes were base")
    _judge_annotations(audited, made_by.get("annotations"), whose, found)
    return f"{made_by.get('detector', 'a network')} trained on {total:,d} boxes, all of base classes"


def _judge_annotations(audited: Audited, annotations: Any, whose: str, found: Findings) -> None:
    """A file is known by its sha256; other pictures than those of --data are neither passed nor a leak."""
    recorded = annotations.get("sha256") if isinstance(annotations, dict) else None
    if not isinstance(recorded, str):
        found.unknown.append(f"{whose} does not say which annotation file was trained on (annotations.sha256)")
    elif audited.val is not None and recorded == audited.val.sha256():
        found.leaks.append(f"{whose}: trained on {audited.val.file}: those are the test pictures")
    elif recorded != audited.truth.sha256():
        file = annotations.get("file", "a file")
        beside = f" nor {audited.val.file}" if audited.val is not None else ", and no validation file was given"
        found.unknown.append(f"{whose}: trained on {file} (sha256 {recorded[:12]}), which is not {audited.truth.file}{beside}: whether it "
                             "saw test pictures is not known; give that file with --annotations, or train with this one")


def _base_names(made_by: dict[str, Any]) -> list[str] | None:
    protocol = made_by.get("protocol")
    base = protocol.get("base") if isinstance(protocol, dict) else None
    return base if isinstance(base, list) else None
