"""The checks of an audit. Each adds to a `Check` what leaked, what is not known, and what else is to be said, and
returns what to say where nothing was found.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hdovd.cache.identity import differences, hash_file
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.text_files import read_toml
from hdovd.data.coco import Skips, Split
from hdovd.data.protocol import load_protocol, shipped_protocols
from hdovd.evaluation.matching import box_ious
from hdovd.pipelines.audit.inputs import Audited, CachedBoxes, GroundTruth, read_run
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.extraction.identities import box_table
from hdovd.pipelines.nouns.allowed import meaning
from hdovd.pipelines.proposal_files.file import ProposalTable
from hdovd.pipelines.runs.folder import UPPER_BOUND

SAME_BOX_PX = 0.05  # between a cached base box and its annotation: float32 and a decimal or two
COPY_PX = 0.02  # decimals of a file that was written and read
LEAST_COPIES, TIMES_CHANCE = 3, 5
IOU = 0.5
# COCO and Objects365 in names of published weights, such as rtdetr_r18vd_5x_coco_objects365.pth, dfine_l_obj2coco.pth;
# but not ov-coco, whose detectors saw boxes of base classes alone.
DETECTION_DATA = re.compile(
    r"(?<![a-z])(?<!ov[-_])(?<!ovd[-_])(?:ms)?coco(?![a-z])|(?<![a-z])o(?:bj(?:ects?)?)?365(?!\d)", re.IGNORECASE
)
RECIPE = "the recipe"  # as `calibration.with_reliability` names numbers that the recipe gives


class Verdict(StrEnum):
    """ok: checked, and no leak. LEAK: novel supervision, or test pictures, were used. unknown: this could not be
    checked.

    report: a diagnosis or a disclosure, which is no leak.
    """

    OK = "ok"
    LEAK = "LEAK"
    UNKNOWN = "unknown"
    REPORT = "report"


@dataclass(slots=True)
class Check:
    """One check: its verdict is the gravest of what it found. `plain`: the verdict, and `fine` the text, where it found
    nothing. `numbers`: the same for scripts, JSON values.
    """

    name: str
    plain: Verdict = Verdict.OK
    fine: str = ""
    leaks: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def cannot(self, why: str) -> str:
        """Ends a check that cannot be made, or made any further."""
        self.unknown.append(why)
        return ""

    @property
    def verdict(self) -> Verdict:
        return Verdict.LEAK if self.leaks else Verdict.UNKNOWN if self.unknown else self.plain

    @property
    def text(self) -> str:
        lines = [*self.leaks, *self.unknown] or [self.fine]
        return lines[0] if len(lines) == 1 else f"{len(lines)} findings"

    @property
    def details(self) -> list[str]:
        """What and where, a line each."""
        lines = [*self.leaks, *self.unknown]
        return [*(lines if len(lines) > 1 else []), *self.notes]


# --- the training set ---


def base_rows(audited: Audited, found: Check) -> str:
    """Every base row of the cache is an annotation of a base class, at its place.

    An id alone proves nothing, because files are renumbered: a row is the annotation of its id if image and box are
    that one's too. Any other row is compared with all boxes of its image: on the box of an annotation that is not base
    it is that, under another id, unless a base annotation has the same box.
    """
    truth, boxes, not_base = audited.truth, audited.boxes, ~audited.truth.of_classes(audited.protocol.base)
    place, twin = np.full(len(boxes.box), -1), np.full(len(boxes.box), -1)
    for _, rows, targets in _together(boxes, boxes.is_base, truth):
        near = _near(boxes, rows, truth, targets)
        own, other = near & _same_ids(boxes, rows, truth, targets), near & not_base[targets]
        alone = other.any(1) & ~(near & ~not_base[targets]).any(1)
        place[rows] = np.where(own.any(1), targets[own.argmax(1)], -1)
        twin[rows] = np.where(alone & ~own.any(1), targets[other.argmax(1)], -1)
    wrong = place[place >= 0][not_base[place[place >= 0]]]
    lines = [f"annotation {truth.id[at]} of image {truth.of_image[at]}" for at in wrong.tolist()]
    found.leaks += [
        f"{len(where):,d} base rows are annotations of {kind}: {shorten(where, 3)}"
        for kind, where in _by_class(audited, wrong, lines).items()
    ]
    others, copies_of = np.flatnonzero(boxes.is_base & (place < 0)), np.flatnonzero(twin >= 0)
    known, copied = np.isin(boxes.annotation_id[others], truth.id), twin[others] >= 0
    lines = [
        f"that of annotation {boxes.annotation_id[row]}, image {boxes.of_image[row]}, has the box of annotation "
        f"{truth.id[twin[row]]}"
        for row in copies_of.tolist()
    ]
    found.leaks += [
        f"{len(where):,d} base rows have the box of a {kind}, under another id: {shorten(where, 3)}"
        for kind, where in _by_class(audited, twin[copies_of], lines).items()
    ]
    for part, why, then in (
        (~known, "are of annotations that {} does not have", "give the annotation file that the cache was made from"),
        (known, "lie elsewhere than their annotation in {}", "is it the file that the cache was made from?"),
    ):
        if ids := boxes.annotation_id[others[part & ~copied]].tolist():
            found.unknown.append(f"{len(ids):,d} base rows {why.format(truth.file)} (ids {shorten(ids)}): {then}")
    found.numbers = {
        "base_rows": int(boxes.is_base.sum()),
        "not_base": len(wrong),
        "copied": int(copied.sum()),
        "unknown_ids": int((~known).sum()),
        "moved": int(known.sum()),
    }
    return f"all {boxes.is_base.sum():,d} base rows are annotations of base classes"


def _together(
    boxes: CachedBoxes, of_cache: np.ndarray, truth: GroundTruth, wanted: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every image that has both: its id, its rows among `of_cache` (M,) bool, and its annotations among `wanted`
    (A,) bool, or all.
    """
    rows = _by_image(boxes.of_image, np.flatnonzero(of_cache))
    targets = _by_image(truth.of_image, np.arange(len(truth.id)) if wanted is None else np.flatnonzero(wanted))
    return ((i, rows[i], targets[i]) for i in sorted(rows.keys() & targets.keys()))


def _by_image(of_image: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
    rows = rows[np.argsort(of_image[rows], kind="stable")]
    ids, first = np.unique(of_image[rows], return_index=True)
    return dict(zip(ids.tolist(), np.split(rows, first[1:]), strict=False))


def _near(boxes: CachedBoxes, rows: np.ndarray, truth: GroundTruth, targets: np.ndarray) -> np.ndarray:
    """(R, T) bool: rows of the cache that lie where annotations do."""
    return np.asarray((np.abs(boxes.box[rows][:, None] - truth.box[targets]) <= SAME_BOX_PX).all(-1))


def _same_ids(boxes: CachedBoxes, rows: np.ndarray, truth: GroundTruth, targets: np.ndarray) -> np.ndarray:
    return np.asarray(boxes.annotation_id[rows][:, None] == truth.id[targets])


def _by_class(audited: Audited, places: np.ndarray, lines: list[str]) -> dict[str, list[object]]:
    """A line for each of `places` in the annotations, by the annotation's class in words."""
    found: dict[str, list[object]] = {}
    for at, line in zip(places.tolist(), lines, strict=True):
        found.setdefault(audited.called(audited.truth.class_name(at)), []).append(line)
    return found


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
    if protocol.name in shipped_protocols():
        compared.append("the protocol that hdovd ships")
    return (
        f"the {len(protocol.base)} base and {len(protocol.novel)} novel classes of {called} "
        f"are also those of {', '.join(compared)}"
    )


def _against_shipped(tree: Any, who: str) -> list[str]:
    name = tree.get("name")
    if name not in shipped_protocols():
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


def pictures(audited: Audited, found: Check) -> str:
    """No training picture is a validation picture, by id and by the bytes of the files."""
    truth, val, ids = audited.truth, audited.val, audited.boxes.image_id.tolist()
    assert val is not None
    files = {i: truth.folder / truth.images[i][0] for i in ids if i in truth.images}
    val_files = {i: val.folder / entry[0] for i, entry in val.images.items()}
    if absent_ids := [i for i in ids if i not in files]:
        found.unknown.append(
            f"{len(absent_ids):,d} images of the cache are not in {truth.file} (ids {shorten(absent_ids)})"
        )
    sizes = {p: p.stat().st_size if p.is_file() else None for p in (*files.values(), *val_files.values())}
    hashes = _content(sizes, files.values(), val_files.values())
    _judge_shared_ids(audited, val, files, val_files, hashes, found)
    by_hash = {hashes[file]: file for file in val_files.values() if file in hashes}
    found.leaks += [
        f"training image {image_id} ({file}) is byte for byte the validation picture {by_hash[hashes[file]]}"
        for image_id, file in files.items()
        if hashes.get(file) in by_hash and image_id not in val_files
    ]
    if absent := [str(file) for file, size in sizes.items() if size is None]:
        found.unknown.append(
            f"{len(absent):,d} pictures are not on this machine, so their content was not compared "
            f"({shorten(list(absent), 2)})"
        )
    found.numbers = {"training": len(files), "validation": len(val_files), "absent": len(absent)}
    return (
        f"none of {len(files):,d} training pictures is one of {len(val_files):,d} validation pictures, by id or bytes"
    )


def _content(sizes: Mapping[Path, int | None], one: Iterable[Path], two: Iterable[Path]) -> dict[Path, str]:
    """sha256 of those files that have the size of a file of the other side."""
    common = {sizes[file] for file in one} & {sizes[file] for file in two} - {None}
    wanted = [file for file, size in sizes.items() if size in common]
    return {file: hash_file(file) for file in progress(wanted, "comparing pictures", "picture", len(wanted))}


def _judge_shared_ids(
    audited: Audited,
    val: GroundTruth,
    files: dict[int, Path],
    val_files: dict[int, Path],
    hashes: dict[Path, str],
    found: Check,
) -> None:
    """Ids on both sides: sets that both count from one share them too, so bytes must agree, or without the files name
    and size.

    A picture that the training file does not have is known by its base boxes, if those are annotations of the
    validation file.
    """
    boxes, unseen = audited.boxes, list[object]()
    annotated = {
        image_id
        for image_id, rows, targets in _together(boxes, boxes.is_base, val)
        if (_near(boxes, rows, val, targets) & _same_ids(boxes, rows, val, targets)).any()
    }
    for image_id in sorted(set(boxes.image_id.tolist()) & val_files.keys()):
        mine, other = files.get(image_id), val_files[image_id]
        if mine is not None and mine.is_file() and other.is_file():
            same, sure = mine in hashes and hashes[mine] == hashes.get(other), True
        else:
            same = sure = (
                image_id in annotated if mine is None else audited.truth.images[image_id] == val.images[image_id]
            )
        if not sure:
            unseen.append(image_id)
        elif same:
            found.leaks.append(f"image {image_id} is in the training set and in {val.file}")
        else:
            found.notes.append(f"image id {image_id} is used for a training and another validation picture")
    if unseen:
        found.unknown.append(
            f"{len(unseen):,d} image ids are on both sides (ids {shorten(unseen)}) with other file names or sizes, "
            f"or are not in the training file, and the pictures are not here to be compared: are they the same?"
        )


# --- proposals ---


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


def copies(audited: Audited, found: Check) -> str:
    """No more proposals than by chance are ground truth boxes of novel classes, to the digit.

    Chance is measured: how often proposals are such boxes with one side moved by a pixel. Sides at the image's edge say
    nothing, so three others are needed.
    """
    boxes, truth = audited.boxes, audited.truth
    shifts = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)]).astype(np.float32)
    hits, copied = np.zeros(len(shifts), np.int64), list[int]()
    for image_id, rows, targets in _together(boxes, ~boxes.is_base, truth, truth.of_classes(audited.protocol.novel)):
        theirs, limit = truth.box[targets], np.array(truth.images[image_id][1:] * 2, np.float32)
        inside = ((theirs > 0.5) & (theirs < limit - 0.5)).sum(1) >= 3
        away = boxes.box[rows][:, None] - theirs[inside][None]
        same = np.stack([(np.abs(away - shift) <= COPY_PX).all(-1) for shift in shifts])
        hits += same.any(2).sum(1)
        copied += targets[inside][same[0].any(0)].tolist()
    count, chance, proposals = int(hits[0]), int(hits[1:].max()), int((~boxes.is_base).sum())
    text = f"{count:,d} of {proposals:,d} proposals are novel ground truth boxes to {COPY_PX} px (jittered copies are not looked for)"  # noqa: E501
    if count >= LEAST_COPIES and count > TIMES_CHANCE * chance:
        found.leaks.append(f"{text}; by chance it would be about {chance}: they were made from the annotations")
        found.notes += [
            f"image {truth.of_image[i]}, annotation {truth.id[i]}, a {truth.class_name(i)!r}" for i in copied
        ]
    found.numbers = {
        "copies": count,
        "chance": chance,
        "proposals": proposals,
        "by_class": dict(Counter(map(truth.class_name, copied))),
    }
    return text + (f", by chance it would be about {chance}" if count else "")


# --- the run ---


def run_cache(audited: Audited, found: Check) -> str:
    """The run was trained on the products of the set that is audited."""
    run, cache, path = audited.run, audited.cache, audited.run_path
    if "imported" in run:
        return found.cannot(f"{path} was imported from {_origin(run)}: what it was trained on is not recorded")
    levels = value_at(run, "cache.levels")
    if not isinstance(levels, dict) or not all(value_at(entry, "key") for entry in levels.values()):
        return found.cannot("run.json does not say which cache the run read")
    for level in Level:
        theirs = value_at(levels, f"{level}.key")
        ours = cache.key(level) if level in cache.levels() else None
        if theirs != ours:
            found.unknown.append(
                f"{path} was trained on {level} {theirs or '(none)'}, this set has {ours or '(none)'}: what it read "
                f"was not audited; audit {run['cache'].get('path', 'the cache that it read')}, or another set of it "
                f"with --features"
            )
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


def backbone(audited: Audited, found: Check) -> str:
    """The run's backbone started from weights that saw no novel box and no test picture, as their file says."""
    return _judge_run(audited, found, audited.run, audited.run_path, set())


def _judge_run(audited: Audited, found: Check, run: dict[str, Any], path: Path, seen: set[Path]) -> str:
    """A run's backbone, and that of the run whose weights it began with, where that is here; and which boxes each saw.
    `seen`: runs that began with its weights.
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
                _judge_run(audited, found, read_run(before / "run.json"), before, seen)
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
    started = "random weights" if weights == "none" else f"the weights that {publisher} publishes"
    return f"{network} started from {started}"


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
    record, cache, others = audited.run.get("reliability"), audited.cache, list[object]()
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
    for level in (Level.INSTANCE, Level.CLASS):
        key = products.get(str(level))
        if key is None:
            found.unknown.append(f"the calibration does not say which {level} product it was fitted on")
        elif level not in cache.levels() or key != cache.key(level):
            others.append(f"{level} {key}")
    if others:
        found.unknown.append(
            f"it was fitted on other products than this cache's ({shorten(others)}): audit the cache that has them"
        )
    return f"fitted on the names of {len(classes)} base classes and this cache's base boxes"


# --- disclosures: pseudo boxes on novel objects are what the method wants, and never a leak ---


def class_of_noun(
    nouns: Sequence[str], classes: Sequence[str], synonyms: Mapping[str, Sequence[str]]
) -> dict[int, str]:
    """The class that a noun names, by the noun's row: its name or a synonym, in whatever form (`nouns.meaning`)."""
    meant = {meaning(own): name for name in reversed(classes) for own in (*synonyms.get(name, ()), name)}
    return {row: meant[form] for row, noun in enumerate(nouns) if (form := meaning(noun)) in meant}


def _novel_nouns(audited: Audited) -> dict[int, str]:
    cache = audited.cache
    inputs = cache.key_inputs(Level.CLASS) if Level.CLASS in cache.levels() else {}
    return class_of_noun(audited.boxes.nouns, audited.protocol.novel, inputs.get("synonyms", {}))


def novel_names(audited: Audited, found: Check) -> str:
    """A disclosure: captions may name novel classes, and results must say that they did."""
    nouns, noun, novel = audited.boxes.nouns, audited.boxes.noun, audited.protocol.novel
    found.plain = Verdict.REPORT
    if noun is None:
        return "the cache has no nouns: no pseudo box is named"
    if not nouns:
        return found.cannot(
            "pseudo boxes have texts that others published without the words: which they are is not known"
        )
    wins = np.bincount(noun[noun >= 0], minlength=len(nouns)).tolist()
    meant = dict(sorted(_novel_nouns(audited).items(), key=lambda entry: -wins[entry[0]]))
    found.notes += [
        f"{nouns[row]}: {wins[row]:,d}" + (f" (for {name})" if name != nouns[row] else "")
        for row, name in meant.items()
    ]
    found.numbers = {
        "nouns": len(nouns),
        "pseudo_labels": sum(wins),
        "won": {nouns[row]: {"class": name, "pseudo_labels": wins[row]} for row, name in meant.items()},
    }
    if not meant:
        return f"none of the {len(nouns)} nouns names one of the {len(novel)} novel classes, in singular or plural"
    return (
        f"{len(set(meant.values()))} of the {len(novel)} novel classes are named by {len(meant)} of {len(nouns)} "
        f"nouns, which won {sum(wins[row] for row in meant):,d} of {sum(wins):,d} pseudo labels (allowed, "
        f"since captions name them; say so with results)"
    )


def pseudo_boxes(audited: Audited, found: Check) -> str:
    """A diagnosis: how many pseudo boxes lie on novel objects, and how many of those have the right noun."""
    boxes, truth, novel = audited.boxes, audited.truth, audited.protocol.novel
    wanted, meant = truth.of_classes(novel) & ~truth.crowd, _novel_nouns(audited)
    on_novel, right, covered = Counter[str](), Counter[str](), Counter[str]()
    for _, rows, targets in _together(boxes, ~boxes.is_base, truth, wanted):
        overlap = box_ious(boxes.box[rows], truth.box[targets])
        covered.update(map(truth.class_name, targets[(overlap >= IOU).any(0)].tolist()))
        on = np.flatnonzero(overlap.max(1) >= IOU)
        for row, target in zip(rows[on].tolist(), targets[overlap.argmax(1)[on]].tolist(), strict=True):
            name = truth.class_name(target)
            on_novel[name] += 1
            right[name] += boxes.noun is not None and meant.get(int(boxes.noun[row])) == name
    there = np.flatnonzero(wanted & np.isin(truth.of_image, boxes.image_id))
    objects, proposals = Counter(map(truth.class_name, there.tolist())), int((~boxes.is_base).sum())
    found.plain = Verdict.REPORT
    found.notes += [
        f"{name}: {on_novel[name]:,d} boxes"
        + (f", {right[name]:,d} rightly named" if boxes.nouns else "")
        + f"; {covered[name]:,d} of {objects[name]:,d} objects"
        for name in novel
        if objects[name]
    ]
    by_class = {
        name: {"boxes": on_novel[name], "right": right[name], "covered": covered[name], "objects": objects[name]}
        for name in novel
    }
    found.numbers = {"pseudo_boxes": proposals, "by_class": by_class}
    named = f", {right.total():,d} of them with the right noun" if boxes.nouns else "; their nouns are not known"
    return (
        f"{on_novel.total():,d} of {proposals:,d} pseudo boxes lie on a novel object (IoU >= {IOU}){named}; "
        f"{covered.total():,d} of {objects.total():,d} novel objects have one (diagnosis only: it must not choose "
        f"settings)"
    )
