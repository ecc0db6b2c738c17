"""What an audit looks at: annotation files as they are, all classes of them, a cache's boxes, a run's record; and the
checks of boxes and pictures. Those of records stand in `audit`.

A check adds to a `Check` what leaked, what is not known, and what else is to be said, and returns what to say where
nothing was found. Training never sees these annotations: `coco.load_split` leaves novel boxes out. N images, A
annotations, M rows of boxes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache import Level, Source, hash_file, local_run, require_seal
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, shorten
from hdovd.core.text_files import read_json
from hdovd.data import DataPaths, Instances, Protocol, load_protocol, read_instances
from hdovd.data.coco import coco_ids_of
from hdovd.evaluation.matching import box_ious
from hdovd.pipelines.audit.config import AuditConfig
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.nouns.allowed import meaning

SAME_BOX_PX = 0.05  # between a cached base box and its annotation: float32 and a decimal or two
COPY_PX = 0.02  # decimals of a file that was written and read
LEAST_COPIES, TIMES_CHANCE = 3, 5
IOU = 0.5


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


# --- what is looked at ---


@dataclass(frozen=True, slots=True, eq=False)
class CachedBoxes:
    """The box table of a cache: image_id (N,); of_image (M,), the image id of each row, box (M, 4) f32 xyxy, is_base
    (M,) bool, annotation_id (M,); noun (M,) int32, rows of `nouns` or -1, or None where nothing was named. `nouns`:
    empty if they are not known.
    """

    image_id: np.ndarray
    of_image: np.ndarray
    box: np.ndarray
    is_base: np.ndarray
    annotation_id: np.ndarray
    noun: np.ndarray | None
    nouns: tuple[str, ...]


def read_boxes(cache: FeatureCache) -> CachedBoxes:
    """Raises HdovdError if the cache has no boxes."""
    if Level.BOXES not in cache.levels():
        raise HdovdError(
            f"{cache.url}: the set has no boxes, so there is nothing to audit: extract it with hdovd extract-clip"
        )
    boxes = cache.product(Level.BOXES)
    image_id = boxes.table("image_id")
    named = {Level.PSEUDO_LABEL, Level.NOUN} <= set(cache.levels())
    return CachedBoxes(
        image_id,
        np.repeat(image_id, np.diff(boxes.table("offset"))),
        boxes.table("box"),
        np.asarray(boxes.table("source") == Source.BASE_BOX),
        boxes.table("annotation_id"),
        cache.product(Level.PSEUDO_LABEL).table("noun") if named else None,
        tuple(cache.known_nouns()) if named else (),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Audited:
    """All that the checks look at. `missing`: of `val` and of `run`, which is empty then, why they are not there."""

    protocol: Protocol
    truth: Instances
    val: Instances | None
    cache: FeatureCache
    boxes: CachedBoxes
    run: dict[str, Any]
    run_path: Path
    missing: dict[str, str]

    def class_name(self, row: int) -> str:
        """Of an annotation."""
        category = int(self.truth.categories[row])
        return self.truth.names.get(category, f"category {category}")

    def called(self, name: str) -> str:
        """A class that is not base, in words."""
        return f"{name!r}, which is {'novel' if name in self.protocol.novel else 'no base class'}"


def read_audited(config: AuditConfig) -> Audited:
    """Raises HdovdError for what cannot be read, and for data that do not know the protocol's classes."""
    protocol, data = load_protocol(config.protocol), DataPaths(config.data.root, form=config.data.form)
    truth = read_instances(config.data.annotation_file("train2017"), config.data.image_folder("train2017"))
    coco_ids_of(truth.names, protocol, truth.file)
    missing = {} if config.run is not None else {"run": "no --run was given: not checked"}
    val = None
    try:
        val_file = data.annotation_file("val2017")
    except HdovdError as error:
        missing["val"] = f"{error}: whether training and validation share pictures is not known"
    else:
        val = read_instances(val_file, data.image_folder("val2017"))
    cache = FeatureCache(config.cache, config.features)
    return Audited(
        protocol,
        truth,
        val,
        cache,
        read_boxes(cache),
        {} if config.run is None else read_run(local_run(config.run) / "run.json"),
        Path() if config.run is None else local_run(config.run),
        missing,
    )


def read_run(file: Path) -> dict[str, Any]:
    """The record of a run. Raises HdovdError if it cannot be read or was changed by others."""
    try:
        tree: dict[str, Any] = dict(read_json(file, "--run"))
        require_seal(tree)
    except (TypeError, ValueError) as error:
        raise HdovdError(f"{file} is not what hdovd train wrote ({error}): it cannot be audited") from error
    return tree


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
        near, own = _matches(boxes, rows, truth, targets)
        other = near & not_base[targets]
        alone = other.any(1) & ~(near & ~not_base[targets]).any(1)
        place[rows] = np.where(own.any(1), targets[own.argmax(1)], -1)
        twin[rows] = np.where(alone & ~own.any(1), targets[other.argmax(1)], -1)
    wrong = place[place >= 0][not_base[place[place >= 0]]]
    lines = [f"annotation {truth.ids[at]} of image {truth.image_ids[at]}" for at in wrong.tolist()]
    found.leaks += [
        f"{len(where):,d} base rows are annotations of {kind}: {shorten(where, 3)}"
        for kind, where in _by_class(audited, wrong, lines).items()
    ]
    others, copies_of = np.flatnonzero(boxes.is_base & (place < 0)), np.flatnonzero(twin >= 0)
    known, copied = np.isin(boxes.annotation_id[others], truth.ids), twin[others] >= 0
    lines = [
        f"that of annotation {boxes.annotation_id[row]}, image {boxes.of_image[row]}, has the box of annotation "
        f"{truth.ids[twin[row]]}"
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
    boxes: CachedBoxes, of_cache: np.ndarray, truth: Instances, wanted: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every image that has both: its id, its rows among `of_cache` (M,) bool, and its annotations among `wanted`
    (A,) bool, or all.
    """
    rows = _by_image(boxes.of_image, np.flatnonzero(of_cache))
    targets = _by_image(truth.image_ids, np.arange(len(truth.ids)) if wanted is None else np.flatnonzero(wanted))
    return ((i, rows[i], targets[i]) for i in sorted(rows.keys() & targets.keys()))


def _by_image(of_image: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
    rows = rows[np.argsort(of_image[rows], kind="stable")]
    ids, first = np.unique(of_image[rows], return_index=True)
    return dict(zip(ids.tolist(), np.split(rows, first[1:]), strict=False))


def _matches(
    boxes: CachedBoxes, rows: np.ndarray, truth: Instances, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(R, T) bool: rows of the cache that lie where annotations do; and those of them that have their ids too."""
    near = (np.abs(boxes.box[rows][:, None] - truth.corners[targets]) <= SAME_BOX_PX).all(-1)
    return near, near & (boxes.annotation_id[rows][:, None] == truth.ids[targets])


def _by_class(audited: Audited, places: np.ndarray, lines: list[str]) -> dict[str, list[object]]:
    """A line for each of `places` in the annotations, by the annotation's class in words."""
    found: dict[str, list[object]] = {}
    for at, line in zip(places.tolist(), lines, strict=True):
        found.setdefault(audited.called(audited.class_name(at)), []).append(line)
    return found


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
    val: Instances,
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
        if _matches(boxes, rows, val, targets)[1].any()
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


def copies(audited: Audited, found: Check) -> str:
    """No more proposals than by chance are ground truth boxes of novel classes, to the digit.

    Chance is measured: how often proposals are such boxes with one side moved by a pixel. Sides at the image's edge say
    nothing, so three others are needed.
    """
    boxes, truth = audited.boxes, audited.truth
    shifts = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)]).astype(np.float32)
    hits, copied = np.zeros(len(shifts), np.int64), list[int]()
    for image_id, rows, targets in _together(boxes, ~boxes.is_base, truth, truth.of_classes(audited.protocol.novel)):
        theirs, limit = truth.corners[targets], np.array(truth.images[image_id][1:] * 2, np.float32)
        inside = ((theirs > 0.5) & (theirs < limit - 0.5)).sum(1) >= 3
        away = boxes.box[rows][:, None] - theirs[inside]
        same = (np.abs(away - shifts[:, None, None]) <= COPY_PX).all(-1)
        hits += same.any(2).sum(1)
        copied += targets[inside][same[0].any(0)].tolist()
    count, chance, proposals = int(hits[0]), int(hits[1:].max()), int((~boxes.is_base).sum())
    text = f"{count:,d} of {proposals:,d} proposals are novel ground truth boxes to {COPY_PX} px (jittered copies are not looked for)"  # noqa: E501
    if count >= LEAST_COPIES and count > TIMES_CHANCE * chance:
        found.leaks.append(f"{text}; by chance it would be about {chance}: they were made from the annotations")
        found.notes += [
            f"image {truth.image_ids[i]}, annotation {truth.ids[i]}, a {audited.class_name(i)!r}" for i in copied
        ]
    found.numbers = {
        "copies": count,
        "chance": chance,
        "proposals": proposals,
        "by_class": dict(Counter(map(audited.class_name, copied))),
    }
    return text + (f", by chance it would be about {chance}" if count else "")


# --- disclosures: pseudo boxes on novel objects are what the method wants, and never a leak ---


def class_of_noun(
    nouns: Sequence[str], classes: Sequence[str], synonyms: Mapping[str, Sequence[str]]
) -> dict[int, str]:
    """The class that a noun names, by the noun's row: its name or a synonym, in whatever form (`nouns.meaning`)."""
    meant = {meaning(own): name for name in reversed(classes) for own in (*synonyms.get(name, ()), name)}
    return {row: meant[form] for row, noun in enumerate(nouns) if (form := meaning(noun)) in meant}


def _novel_nouns(audited: Audited) -> dict[int, str]:
    inputs = audited.cache.key_inputs(Level.CLASS) if Level.CLASS in audited.cache.levels() else {}
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
        overlap = box_ious(boxes.box[rows], truth.corners[targets])
        covered.update(map(audited.class_name, targets[(overlap >= IOU).any(0)].tolist()))
        on = np.flatnonzero(overlap.max(1) >= IOU)
        for row, target in zip(rows[on].tolist(), targets[overlap.argmax(1)[on]].tolist(), strict=True):
            name = audited.class_name(target)
            on_novel[name] += 1
            right[name] += boxes.noun is not None and meant.get(int(boxes.noun[row])) == name
    there = np.flatnonzero(wanted & np.isin(truth.image_ids, boxes.image_id)).tolist()
    objects, proposals = Counter(map(audited.class_name, there)), int((~boxes.is_base).sum())
    found.plain = Verdict.REPORT
    found.notes += [
        f"{name}: {on_novel[name]:,d} boxes"
        + (f", {right[name]:,d} rightly named" if boxes.nouns else "")
        + f"; {covered[name]:,d} of {objects[name]:,d} objects"
        for name in novel
        if objects[name]
    ]
    found.numbers = {
        "pseudo_boxes": proposals,
        "by_class": {
            name: {"boxes": on_novel[name], "right": right[name], "covered": covered[name], "objects": objects[name]}
            for name in novel
        },
    }
    named = f", {right.total():,d} of them with the right noun" if boxes.nouns else "; their nouns are not known"
    return (
        f"{on_novel.total():,d} of {proposals:,d} pseudo boxes lie on a novel object (IoU >= {IOU}){named}; "
        f"{covered.total():,d} of {objects.total():,d} novel objects have one (diagnosis only: it must not choose "
        f"settings)"
    )
