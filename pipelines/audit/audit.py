"""The leak report that reviewers want: did anything learn from novel annotations, or from test pictures?

It compares what a cache and a run recorded with the raw annotation files, which it reads with all their classes.
docs/AUDIT.md says what each check means. It writes nothing into the cache or the run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hdovd.cache.identity import hash_file
from hdovd.cache.schema import Level
from hdovd.core.log import log, quiet
from hdovd.pipelines.audit import checks
from hdovd.pipelines.audit.checks import Check, Verdict
from hdovd.pipelines.audit.config import AuditConfig
from hdovd.pipelines.audit.inputs import Audited, read_audited
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.proposal_files.file import read_table

SHOWN = 10  # details of a check in the text report; JSON has all


@dataclass(frozen=True, slots=True)
class AuditReport:
    """`about`: what was audited, by name."""

    about: dict[str, Any]
    checks: list[Check]

    @property
    def leaks(self) -> int:
        return sum(check.verdict is Verdict.LEAK for check in self.checks)

    @property
    def unknown(self) -> int:
        return sum(check.verdict is Verdict.UNKNOWN for check in self.checks)

    def lines(self) -> list[str]:
        """The report as text: a line a check, its details below it."""
        lines = ["audit", *(f"  {name:12s}{value}" for name, value in self.about.items()), ""]
        for check in self.checks:
            shown = len(check.details) if len(check.details) <= SHOWN + 1 else SHOWN
            more = [f"and {len(check.details) - shown} more: --json lists all"] if shown < len(check.details) else []
            lines += [
                f"{check.verdict:9s}{check.name:22s}{check.text}",
                *(f"{'':31s}{detail}" for detail in [*check.details[:shown], *more]),
            ]
        verdict = f"{self.leaks} LEAK{'S' if self.leaks > 1 else ''}" if self.leaks else "no leak found"
        if self.unknown:
            verdict += f"; {self.unknown} of {len(self.checks)} checks could not be made in full"
        return [*lines, "", verdict]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "about": self.about,
            "leaks": self.leaks,
            "unknown": self.unknown,
            "checks": [
                {key: getattr(check, key) for key in ("name", "verdict", "text", "details", "numbers")}
                for check in self.checks
            ],
        }


def audit(config: AuditConfig) -> AuditReport:
    """All checks; the report goes to `log`. Raises HdovdError for input that cannot be read."""
    config.check()
    audited = read_audited(config)
    cache, protocol = audited.cache, audited.protocol
    about = {
        "cache": cache.url,
        "set": config.features,
        "protocol": f"{protocol.name}, {len(protocol.base)} base and {len(protocol.novel)} novel classes",
        "annotations": str(audited.truth.file),
        "run": str(config.run or "none given"),
        "proposals": cache.set.proposals.get("identity", "not recorded"),
    }
    report = AuditReport(
        about,
        [
            _made(audited, "base boxes", checks.base_rows),
            _made(audited, "class lists", checks.class_lists),
            _made(audited, "train and val", checks.pictures, "val"),
            *_proposal_checks(config, audited),
            _made(audited, "proposals: copies", checks.copies),
            _made(audited, "run: cache", checks.run_cache, "run"),
            _made(audited, "run: boxes", checks.run_boxes, "run"),
            _made(audited, "run: backbone", checks.backbone, "run"),
            _made(audited, "calibration", checks.calibration, "run"),
            _made(audited, "novel names", checks.novel_names),
            _made(audited, "pseudo boxes", checks.pseudo_boxes),
        ],
    )
    log(*report.lines())
    if config.json_out is not None:
        tree = report.to_dict() | {
            "levels": {str(level): cache.key(level) for level in cache.levels()},
            "annotations_sha256": hash_file(audited.truth.file),
        }
        write_text(config.json_out, json.dumps(tree, indent=1))
    return report


def _made(audited: Audited, name: str, check: Callable[[Audited, Check], str], needs: str = "") -> Check:
    """A check of that name, which cannot be made without what it `needs`."""
    found = Check(name)
    if needs in audited.missing:
        found.unknown.append(audited.missing[needs])
    else:
        found.fine = check(audited, found)
    return found


def _proposal_checks(config: AuditConfig, audited: Audited) -> list[Check]:
    """Of the set's record and, where it was given, of the file."""
    recorded, name = audited.cache.set.proposals.get("made_by"), "proposals: made by"
    by_cache = partial(checks.made_by, recorded, "the cache's record of its proposals")
    cache = audited.cache
    named = Level.PSEUDO_LABEL in cache.levels() and "verdicts" in cache.key_inputs(Level.PSEUDO_LABEL)
    others = [_made(audited, "verdicts: made by", checks.verdicts)] if named else []
    if config.proposals is None:
        return [_made(audited, name, by_cache), *others]
    with quiet():
        split = config.data.load("train2017", audited.protocol, base_only=True)
    table = read_table(config.proposals, audited.truth.file)
    found = [
        _made(audited, "proposals: the file", partial(checks.same_proposals, table, split, config.proposals)),
        _made(audited, name, partial(checks.made_by, table.made_by, str(config.proposals))),
    ]
    again = [_made(audited, name, by_cache)] if recorded and recorded != table.made_by else []
    return [*found, *again, *others]
