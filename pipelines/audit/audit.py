"""The leak report that reviewers want: did anything learn from novel annotations, or from test pictures?

It compares what a cache and a run recorded with the raw annotation files, which it reads with all their classes:
boxes and pictures in `checks`, records here. docs/AUDIT.md says what each check means. It writes nothing into the cache
or the run.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hdovd.cache import Level, differences, hash_file
from hdovd.core import HdovdError, log, quiet, shorten
from hdovd.core.text_files import read_toml, shipped
from hdovd.data import Skips, Split, load_protocol
from hdovd.pipelines.audit import checks
from hdovd.pipelines.audit.checks import Audited, Check, Verdict, read_audited, read_run
from hdovd.pipelines.audit.config import AuditConfig
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.extraction.identities import box_table
from hdovd.pipelines.proposal_files.file import ProposalTable, read_table
from hdovd.pipelines.runs import UPPER_BOUND

SHOWN = 10  # details of a check in the text report; JSON has all
# COCO and Objects365 in names of published weights, such as rtdetr_r18vd_5x_coco_objects365.pth, dfine_l_obj2coco.pth;
# but not ov-coco, whose detectors saw boxes of base classes alone.
DETECTION_DATA = re.compile(
    r"(?<![a-z])(?<!ov[-_])(?<!ovd[-_])(?:ms)?coco(?![a-z])|(?<![a-z])o(?:bj(?:ects?)?)?365(?!\d)", re.IGNORECASE
)
RECIPE = "the recipe"  # as `calibration.with_reliability` names numbers that the recipe gives


# --- classes ---


def class_lists(audited: Audited, found: Check) -> str:
    """The class lists of the protocol, the cache and the run are those of the shipped protocol of that name, and of
    each other.
    """
    protocol, compared = audited.protocol, ["the cache's class level"]
    given, called = protocol.to_dict(), f"protocol {protocol.name}"
    if not protocol.novel:
        found.unknown.append(
            f"{called} holds no class back as novel: whether boxes of novel classes were trained on cannot be said by "
            f"it; audit with the protocol that AP is stated for"
        )
    found.leaks += _against_shipped(given, "the protocol that was given")
    if Level.CLASS in audited.cache.levels():
        names = audited.cache.names(Level.CLASS)
        found.leaks += [
            *(
                f"the cache has text embeddings of {lone!r}, which {called} does not name"
                for lone in names
                if lone not in protocol.names
            ),
            *(
                f"{called} names {lone!r}, which the cache's class level does not have"
                for lone in protocol.names
                if lone not in names
            ),
        ]
    else:
        found.unknown.append("the cache has no class level, so which classes it was made for is not known")
    if "run" not in audited.missing:
        compared.append("run.json")
        recorded = value_at(audited.run, "adapted.protocol") or audited.run.get("protocol")
        if all(isinstance(value_at(recorded, kind), list) for kind in ("base", "novel")):
            found.leaks += [*_differences(recorded, given, "run.json", called), *_against_shipped(recorded, "run.json")]
        else:
            found.unknown.append("run.json does not say which protocol the run followed")
    if protocol.name in shipped("protocols"):
        compared.append("the protocol that hdovd ships")
    return (
        f"the {len(protocol.base)} base and {len(protocol.novel)} novel classes of {called} "
        f"are also those of {', '.join(compared)}"
    )


def _against_shipped(tree: Any, who: str) -> list[str]:
    name = tree.get("name")
    if name not in shipped("protocols"):
        return []
    return _differences(
        tree, load_protocol(name).to_dict(), f"{who}, which calls itself {name},", f"the {name} that hdovd ships"
    )


def _differences(tree: Any, other: Any, who: str, whose: str) -> list[str]:
    return [
        f"{has} has {name!r} as {kind}, {lacks} has not"
        for kind in ("base", "novel")
        for has, own, lacks, others in ((who, tree, whose, other), (whose, other, who, tree))
        for name in own[kind]
        if name not in others[kind]
    ]


# --- what made the proposals ---


def made_by(record: dict[str, Any] | None, whose: str, audited: Audited, found: Check) -> str:
    """The proposals' network was trained on base boxes alone, as its record says. `whose`: the record, in words."""
    if record:
        return _judge_rounds(audited, found, record, whose)
    if audited.boxes.is_base.all():
        return "the cache has no proposals"
    return found.cannot(f"{whose} does not say what made the proposals: whether that saw novel boxes is not known")


def verdicts(audited: Audited, found: Check) -> str:
    """What named the proposals besides CLIP is what made them."""
    if not _own_verdicts(audited.cache.set.proposals):
        return found.cannot("what made the verdicts is not known: whether that saw novel annotations neither")
    return "of what made the proposals"


def _own_verdicts(proposals: Mapping[str, Any]) -> bool:
    """Whether a set's verdicts, by what it says of its proposals, were made with them."""
    sha256 = value_at(proposals, "verdicts.sha256")
    return sha256 is not None and sha256 == value_at(proposals, "made_by.verdicts_sha256")


def _judge_rounds(audited: Audited, found: Check, record: dict[str, Any], whose: str) -> str:
    """The record of a network, or that of a run of `hdovd relabel`, of which everything before counts: what its
    backbone started from, and the proposals and verdicts that it was trained with.
    """
    first, texts = record, list[str]()
    while True:
        texts.append(_judge_record(audited, found, record, whose))
        if not record.keys() & {"round", "run", "before"}:
            found.numbers = {"made_by": first}
            return ", after ".join(texts)
        if record.get("oracle", False):
            found.leaks.append(f"{whose}: {record.get('run')} is an oracle")
        if record.get("init", "not recorded") is not None or "oracle" not in record:
            found.unknown.append(f"{whose}: what weights {record.get('run')} began with is not known")
        network, weights = (str(value_at(record, f"backbone.{key}")) for key in ("name", "weights"))
        _judge_start(audited, found, network, weights)
        whose, known = f"{whose}, the round before", record.get("before")
        if not isinstance(known, dict) or not isinstance(known.get("made_by"), dict):
            return found.cannot(f"{whose}: what made its proposals is not known")
        if "verdicts" in known and not _own_verdicts(known):
            found.unknown.append(f"{whose}: what made its verdicts is not known")
        record = known["made_by"]


def _judge_record(audited: Audited, found: Check, record: dict[str, Any], whose: str) -> str:
    """What the record says of other than base boxes of training pictures, and what it does not say.

    An annotation file is known by its sha256; other pictures than those of --data are neither passed nor a leak.
    """
    protocol, truth, val, total = audited.protocol, audited.truth, audited.val, 0
    counts, base = record.get("training_boxes"), value_at(record, "protocol.base")
    recorded, found.numbers = value_at(record, "annotations.sha256"), {"made_by": record}
    if isinstance(counts, dict) and all(isinstance(count, int) for count in counts.values()):
        total = sum(counts.values())
        found.leaks += [
            f"{whose}: trained on {count:,d} boxes of {audited.called(own)}"
            for own, count in counts.items()
            if count and own not in protocol.base
        ]
    else:
        found.unknown.append(f"{whose} does not say on how many boxes of which class (training_boxes)")
    if isinstance(base, list):
        found.leaks += [
            f"{whose}: its protocol has {own!r} as base, {protocol.name} has not"
            for own in base
            if own not in protocol.base
        ]
    else:
        found.unknown.append(f"{whose} does not say which classes were base")
    if not isinstance(recorded, str):
        found.unknown.append(f"{whose} does not say which annotation file was trained on (annotations.sha256)")
    elif val is not None and recorded == hash_file(val.file):
        found.leaks.append(f"{whose}: trained on {val.file}: those are the test pictures")
    elif recorded != hash_file(truth.file):
        beside = f" nor {val.file}" if val is not None else ", and no validation file was given"
        found.unknown.append(
            f"{whose}: trained on {record['annotations'].get('file', 'a file')} (sha256 {recorded[:12]}), which is not "
            f"{truth.file}{beside}: whether it saw test pictures is not known; give that file with --annotations, or "
            f"train with this one"
        )
    return f"{record.get('detector', 'a network')} trained on {total:,d} boxes, all of base classes"


def same_proposals(table: ProposalTable, split: Split, file: Path, audited: Audited, found: Check) -> str:
    """The proposal file that was given is what the cache holds."""
    lines = differences(
        {"proposals": box_table(split.images, table.for_images(split.images, Skips())).inputs()["proposals"]},
        {"proposals": audited.cache.key_inputs(Level.BOXES).get("proposals")},
        sides=("the file gives", "the cache has"),
    )
    if lines:
        found.unknown.append(f"the cache was made from other proposals than {file}: " + "; ".join(lines))
    return f"the cache holds the proposals of {file}"


# --- the run ---


def run_cache(audited: Audited, found: Check) -> str:
    """The run was trained on the products of the set that is audited."""
    run, cache, path = audited.run, audited.cache, audited.run_path
    if "imported" in run:
        return found.cannot(f"{path} was imported from {_origin(run)}: what it was trained on is not recorded")
    levels = value_at(run, "cache.levels")
    if not isinstance(levels, dict) or not all(value_at(entry, "key") for entry in levels.values()):
        return found.cannot("run.json does not say which cache the run read")
    theirs = {level: entry["key"] for level, entry in levels.items()}
    ours = {str(level): cache.key(level) for level in cache.levels()}
    found.unknown += [
        f"{path} was trained on {level} {theirs.get(level, '(none)')}, this set has {ours.get(level, '(none)')}: what "
        f"it read was not audited; audit {run['cache'].get('path', 'the cache that it read')}, or another set of it "
        f"with --features"
        for level in map(str, Level)
        if theirs.get(level) != ours.get(level)
    ]
    return f"{path} was trained on this cache: {len(levels)} levels with the same keys"


def run_boxes(audited: Audited, found: Check) -> str:
    """Neither the run nor the one whose weights it began with is an oracle, trained on the boxes of all classes."""
    run, path, init = audited.run, audited.run_path, value_at(audited.run, "init.run")
    if "imported" in run:
        return found.cannot(f"{path} was imported from {_origin(run)}, which does not say what boxes it was trained on")
    found.leaks += [
        f"{whose} is an oracle: trained on the boxes of novel classes too (hdovd train --oracle). Its AP is "
        f"{UPPER_BOUND}"
        for key, whose in (("oracle", str(path)), ("init.oracle", f"{init}, whose weights {path} began with,"))
        if value_at(run, key)
    ]
    return f"{path} is no oracle: hdovd train gave it boxes of base classes alone"


def _origin(run: dict[str, Any]) -> str:
    return str(value_at(run, "imported.file") or "a checkpoint")


def backbone(run: dict[str, Any], path: Path, seen: set[Path], audited: Audited, found: Check) -> str:
    """A run's backbone started from weights that saw no novel box and no test picture, as their file says, and so did
    that of the run whose weights it began with, where that is here; which boxes each saw is told. `seen`: runs that
    began with its weights.
    """
    before, adapted = Path(str(value_at(run, "init.run") or "another run")), run.get("adapted") or {}
    boxes = value_at(adapted.get("protocol") or run.get("protocol"), "base") or []
    knows = adapted.get("teacher") or adapted.get("replay") or not (before / "run.json").is_file()
    again = [name for name in value_at(run, "protocol.base") or [] if knows and name not in boxes]
    found.leaks += [
        f"{path}, whose weights it began with, was trained on boxes of {audited.called(name)}"
        for name in (*boxes, *again)
        if seen and name in audited.protocol.novel
    ]
    earlier = f", and of earlier classes: {shorten(again)}" if again else ""
    found.notes += [f"{path} was trained on boxes of {shorten(boxes)}{earlier}"] if seen or run.get("init") else []
    if "imported" in run:
        _judge_name(audited, found, _origin(run))
        return found.cannot(
            f"{path} was imported from {_origin(run)}, which does not say what its backbone started from"
        )
    if run.get("init"):
        seen.add(path.resolve())
        if before.resolve() not in seen and (before / "run.json").is_file():
            with suppress(HdovdError):  # a record that cannot be read says nothing, and no more is known without it
                backbone(read_run(before / "run.json"), before, seen, audited, found)
        return found.cannot(
            f"{path} began with the weights of {before}: what those were trained on, its own audit says"
        )
    try:
        section = read_toml(path / "config.toml", "recipe")["detector"]["backbone"]
        network, weights = str(section["name"]), str(section["weights"])
    except (HdovdError, KeyError, TypeError) as error:
        return found.cannot(f"{path / 'config.toml'} does not say what the backbone started from ({error!r})")
    return _judge_start(audited, found, network, weights)


def _judge_start(audited: Audited, found: Check, network: str, weights: str) -> str:
    """What a backbone started from."""
    if weights not in ("auto", "none"):
        return _judge_weights(audited, found, Path(weights))
    if ":" in network and not network.startswith(("timm:", "torchvision:")):
        found.unknown.append(f"{network} is code outside of hdovd: which weights it starts from is not known")
    publisher = "timm" if network.startswith("timm:") else "torchvision"
    return f"{network} started from " + (
        "random weights" if weights == "none" else f"the weights that {publisher} publishes"
    )


def _judge_weights(audited: Audited, found: Check, weights: Path) -> str:
    """By what the file itself says made it, and without that by its name."""
    if not weights.is_file():
        _judge_name(audited, found, str(weights))
        return found.cannot(
            f"the backbone started from {weights}, which is not here: what made it is not known; run the audit where "
            f"it is (a relative path counts from the folder that hdovd train ran in)"
        )
    try:
        with safe_open(weights, "np") as tensors:
            record = json.loads((tensors.metadata() or {}).get("made_by", "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):  # a .pth, or damaged: neither has a record
        record = None
    if not isinstance(record, dict):
        _judge_name(audited, found, str(weights))
        return found.cannot(
            f"the backbone started from {weights}, which does not say what made it: whether that saw novel boxes or "
            f"test pictures is not known (files of hdovd propose --backbone-out say so)"
        )
    return f"{weights}: {_judge_record(audited, found, record, str(weights))}"


def _judge_name(audited: Audited, found: Check, weights: str) -> None:
    """Published detectors are named after the data that they were trained on."""
    if audited.protocol.novel and (known := DETECTION_DATA.search(Path(weights).name)):
        found.leaks.append(
            f"{weights} is named as weights of a detector that was trained on {known[0]}, which has boxes of novel "
            f"classes"
        )


def calibration(audited: Audited, found: Check) -> str:
    """The reliability weights were fitted on base names and base boxes alone."""
    record, cache = audited.run.get("reliability"), audited.cache
    if not record:
        return "no calibration recorded: the weights are the recipe's numbers, or none are used"
    source, fitted_on = str(value_at(record, "source") or ""), value_at(record, "fitted_on")
    if source == RECIPE and fitted_on is None:
        found.plain = Verdict.REPORT
        return "the weights are the recipe's numbers: who chose them, and by what, is not recorded"
    if source and fitted_on is None and not source.startswith("calibration"):
        return f"no calibration: the weights are of {source}"
    classes, products = value_at(fitted_on, "classes"), value_at(fitted_on, "levels")
    if not isinstance(classes, list) or not isinstance(products, dict):
        return found.cannot("run.json has a calibration that does not say which classes it was fitted on")
    found.leaks += [f"fitted on the name {audited.called(own)}" for own in classes if own not in audited.protocol.base]
    others = [
        f"{level} {products.get(str(level), '(not said which)')}"
        for level in (Level.INSTANCE, Level.CLASS)
        if level not in cache.levels() or products.get(str(level)) != cache.key(level)
    ]
    if others:
        found.unknown.append(
            f"it was fitted on other products than this cache's ({shorten(others)}): audit the cache that has them"
        )
    return f"fitted on the names of {len(classes)} base classes and this cache's base boxes"


# --- the report ---


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
    report = AuditReport(
        {
            "cache": cache.url,
            "set": config.features,
            "protocol": f"{protocol.name}, {len(protocol.base)} base and {len(protocol.novel)} novel classes",
            "annotations": str(audited.truth.file),
            "run": str(config.run or "none given"),
            "proposals": cache.set.proposals.get("identity", "not recorded"),
        },
        [
            _made(audited, "base boxes", checks.base_rows),
            _made(audited, "class lists", class_lists),
            _made(audited, "train and val", checks.pictures, "val"),
            *_proposal_checks(config, audited),
            _made(audited, "proposals: copies", checks.copies),
            _made(audited, "run: cache", run_cache, "run"),
            _made(audited, "run: boxes", run_boxes, "run"),
            _made(audited, "run: backbone", partial(backbone, audited.run, audited.run_path, set[Path]()), "run"),
            _made(audited, "calibration", calibration, "run"),
            _made(audited, "novel names", checks.novel_names),
            _made(audited, "pseudo boxes", checks.pseudo_boxes),
        ],
    )
    log(*report.lines())
    if config.json_out is not None:
        made_of = {
            "levels": {str(level): cache.key(level) for level in cache.levels()},
            "annotations_sha256": hash_file(audited.truth.file),
        }
        write_text(config.json_out, json.dumps(report.to_dict() | made_of, indent=1))
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
    cache, name, found = audited.cache, "proposals: made by", list[Check]()
    recorded, table = cache.set.proposals.get("made_by"), None
    if config.proposals is not None:
        with quiet():
            split = config.data.load("train2017", audited.protocol, base_only=True)
        table = read_table(config.proposals, audited.truth.file)
        found = [
            _made(audited, "proposals: the file", partial(same_proposals, table, split, config.proposals)),
            _made(audited, name, partial(made_by, table.made_by, str(config.proposals))),
        ]
    if table is None or (recorded and recorded != table.made_by):
        found.append(_made(audited, name, partial(made_by, recorded, "the cache's record of its proposals")))
    if Level.PSEUDO_LABEL in cache.levels() and "verdicts" in cache.key_inputs(Level.PSEUDO_LABEL):
        found.append(_made(audited, "verdicts: made by", verdicts))
    return found
