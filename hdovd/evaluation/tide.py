"""TIDE: what keeps AP50 from 100, by kind of error (Bolya et al., 2020, arXiv 2008.08115), for novel and base classes
apart.

D detections, G objects, K classes. "Overlap" is the IoU with an object that
is no crowd; o is that with an object of the detection's class, x with one of another class. A wrong detection is the
first of these:

    localisation    0.1 <= max o < 0.5
    classification  max x >= 0.5
    duplicate       max o >= 0.5: a better detection has the object
    both            max x >= 0.1
    background      overlaps nothing

What is gained by mending a kind, all others left as they are (section 2.3 of the paper):

    classification, localisation    the class, or box, becomes that of the object, so that the detection is right. An
                                    object is found once: for one that is found already the detection is dropped
                                    instead, and of several errors about one object, of these two kinds together, the
                                    best scored is mended, the others are dropped
    both, duplicate, background     dropped
    missed                          not found, and none of the first two is about it: the object is dropped

Where the paper leaves something open, the order of the tests and which detection is mended above all, this is what its
authors' package tidecv 1.0 does. It differs from it in what follows.
- Detections in a crowd of their class, and those beyond maxDets, are no errors, as they are not to AP; tidecv counts
  the former, and mends them. maxDets caps a class in an image, as in COCOeval; in tidecv an image.
- Intervals are half open: an overlap of exactly 0.5 with an object that another has found is a duplicate (tidecv:
  localisation), one of exactly 0.1 with another class is "both" (background).
- The 101 recalls are COCOeval's to the last bit, which decides at recalls that are met exactly; without this and
  crowds, all counts are tidecv's, and all gains to 1e-12.
- A class without objects is in no mean, as in COCOeval; tidecv counts it as 0 if something was detected as it.
- A gain is the mean over the classes of its group, and may be a little below 0 where fewer objects shift the 101
  recalls; tidecv cuts it off at 0.

As in tidecv, a class all of whose objects are missed gains nothing by dropping them, for nothing is left to be found:
see the counts.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from hdovd.data import Protocol, group_labels, group_mean, groups_of
from hdovd.evaluation.matching import (
    IOU,
    Found,
    Matching,
    Objects,
    Overlaps,
    Verdict,
    curves_of,
    find_overlaps,
    match,
    ranking,
)


class Kind(StrEnum):
    """What a detection is; an object that nothing found and whose finding no CLASSIFICATION or LOCALISATION error
    stands for is MISSED.
    """

    RIGHT = "right"
    CLASSIFICATION = "classification"
    LOCALISATION = "localisation"
    BOTH = "both"
    DUPLICATE = "duplicate"
    BACKGROUND = "background"
    IGNORED = "ignored"
    MISSED = "missed"  # of objects alone


ERRORS = (Kind.CLASSIFICATION, Kind.LOCALISATION, Kind.BOTH, Kind.DUPLICATE, Kind.BACKGROUND, Kind.MISSED)


@dataclass(frozen=True, slots=True)
class Errors:
    """Every error of a run: `kind` (D,) values of `Kind`; `item` (D,): the object that it is about (the one found, the
    crowd it lies in), or -1; `mended_by` (G,): the detection that would find an object that nothing found if its class
    or its box were mended, or -1; `missed` (G,) bool: not found, and not even that.
    """

    kind: np.ndarray
    item: np.ndarray
    mended_by: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True, slots=True)
class GroupErrors:
    """One group of classes.

    `ap50`: percent, mean over its classes with objects; None if none has any. `objects`, `found`: how many there are
    and were found. `counts`: errors by kind: detections by their own class, missed objects by theirs. `gains`: AP50
    that the group's mean would gain if all errors of that kind, of any class, were mended, and only those; None as
    `ap50`. `false_positives`, `false_negatives`: how many detections are wrong and objects not found;
    `false_positive_gain`, `false_negative_gain`: AP50 gained without the former, and without the latter.
    """

    ap50: float | None
    objects: int
    found: int
    counts: dict[Kind, int]
    gains: dict[Kind, float | None]
    false_positives: int
    false_negatives: int
    false_positive_gain: float | None
    false_negative_gain: float | None

    def cells(self) -> list[tuple[int, float | None]]:
        """Count and gain of each of `ERRORS`, of all false detections and of all objects not found."""
        return [
            *((self.counts[kind], self.gains[kind]) for kind in ERRORS),
            (self.false_positives, self.false_positive_gain),
            (self.false_negatives, self.false_negative_gain),
        ]


@dataclass(frozen=True, slots=True)
class ErrorBreakdown:
    """`groups`: by "novel", "base", "all", and the protocol's own. `misnamed[truth][detection]`: classification errors
    by the group ("novel", "base") of the object's class and of the name it was given. `class_counts`, `class_gains`
    (K, 6): of each class, by `ERRORS`; gains NaN for a class without objects.
    """

    protocol: Protocol
    groups: dict[str, GroupErrors]
    misnamed: dict[str, dict[str, int]]
    class_counts: np.ndarray
    class_gains: np.ndarray

    def to_tree(self) -> dict[str, Any]:
        """`{"groups": {group: fields of GroupErrors}, "misnamed": ..., "classes": {name: {"counts": {kind: n}, "gains":
        {kind: x}}}}`; a class without objects has gains None.
        """
        names = [kind.value for kind in ERRORS]
        return {
            "groups": {group: asdict(part) for group, part in self.groups.items()},
            "misnamed": self.misnamed,
            "classes": {
                name: {
                    "counts": dict(zip(names, counts, strict=True)),
                    "gains": None if np.isnan(gains[0]) else dict(zip(names, gains, strict=True)),
                }
                for name, counts, gains in zip(
                    self.protocol.names, self.class_counts.tolist(), self.class_gains.tolist(), strict=True
                )
            },
        }


def break_down(found: Found, objects: Objects, protocol: Protocol) -> ErrorBreakdown:
    """The errors of detections, from the beginning."""
    overlaps = find_overlaps(found, objects)
    matching = match(found, objects, overlaps, max(protocol.max_detections))
    return count_errors(found, objects, matching, classify(found, objects, overlaps, matching), protocol)


def classify(found: Found, objects: Objects, overlaps: Overlaps, matching: Matching) -> Errors:
    """The kind of every detection, and what it is about."""
    asked = (matching.verdict[overlaps.detection] == Verdict.WRONG) & ~objects.crowd[overlaps.item]
    detection, item, iou = overlaps.detection[asked], overlaps.item[asked], overlaps.iou[asked]
    own = found.labels[detection] == objects.labels[item]
    own_item, own_iou = _most_overlapped(detection[own], item[own], iou[own], len(found.labels))
    other_item, other_iou = _most_overlapped(detection[~own], item[~own], iou[~own], len(found.labels))
    tests = [
        matching.verdict == Verdict.RIGHT,
        matching.verdict == Verdict.IGNORED,
        (own_item >= 0) & (own_iou < IOU),
        other_iou >= IOU,
        own_item >= 0,
        other_item >= 0,
    ]
    kinds = [Kind.RIGHT, Kind.IGNORED, Kind.LOCALISATION, Kind.CLASSIFICATION, Kind.DUPLICATE, Kind.BOTH]
    kind = np.select(tests, kinds, Kind.BACKGROUND)
    about = np.select(tests, [matching.item, matching.item, own_item, other_item, own_item, other_item], -1)
    mendable = np.flatnonzero((kind == Kind.CLASSIFICATION) | (kind == Kind.LOCALISATION))
    mendable = mendable[matching.finder[about[mendable]] < 0]
    mendable = mendable[np.argsort(-found.scores[mendable], kind="stable")]
    items, best = np.unique(about[mendable], return_index=True)  # the first, and so the best scored, of each object
    mended_by = np.full(len(objects.labels), -1)
    mended_by[items] = mendable[best]
    return Errors(kind, about, mended_by, (matching.finder < 0) & (mended_by < 0) & ~objects.crowd)


def _most_overlapped(
    detection: np.ndarray, item: np.ndarray, iou: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The object, or -1, that each of `count` detections overlaps most, of equals the first, and the IoU; from pairs
    (P,).
    """
    order = np.lexsort((item, -iou, detection))
    which, first = np.unique(detection[order], return_index=True)
    best, best_iou = np.full(count, -1), np.zeros(count)
    best[which], best_iou[which] = item[order[first]], iou[order[first]]
    return best, best_iou


def count_errors(
    found: Found, objects: Objects, matching: Matching, errors: Errors, protocol: Protocol
) -> ErrorBreakdown:
    """Errors by kind and group, and what AP50 would gain without them."""
    classes, solid = len(protocol.names), ~objects.crowd
    held = np.bincount(objects.labels[solid], minlength=classes)
    hit = np.bincount(objects.labels[matching.finder >= 0], minlength=classes)
    wrong = np.bincount(found.labels[matching.verdict == Verdict.WRONG], minlength=classes)
    missed = np.bincount(objects.labels[errors.missed], minlength=classes)

    def ap50(verdict: np.ndarray, left: np.ndarray, labels: np.ndarray = found.labels) -> np.ndarray:
        """(K,) percent, of `left` (K,) objects to find: 0 for a class of which none is left, NaN for one that had none.
        labels: of detections, by default their own.
        """
        order = matching.rank if labels is found.labels else ranking(labels, found.scores, found.image_ids)
        precision, _ = curves_of(labels[order], found.scores[order], verdict[order], left)
        return np.where(held > 0, np.where(left > 0, precision.mean(axis=1) * 100, 0.0), np.nan)

    def mended(kind: Kind) -> np.ndarray:
        """AP50 (K,) without the errors of a kind."""
        if kind is Kind.MISSED:
            return ap50(matching.verdict, held - missed)
        of_kind = errors.kind == kind
        verdict = np.where(of_kind, Verdict.IGNORED, matching.verdict)  # dropped
        menders, labels = errors.mended_by[errors.mended_by >= 0], found.labels.copy()
        menders = menders[of_kind[menders]]
        verdict[menders] = Verdict.RIGHT
        labels[menders] = objects.labels[errors.item[menders]]
        return ap50(verdict, held, labels)

    plain = ap50(matching.verdict, held)
    gains = np.stack([mended(kind) - plain for kind in ERRORS], axis=1)
    counts = np.stack(
        [
            missed if kind is Kind.MISSED else np.bincount(found.labels[errors.kind == kind], minlength=classes)
            for kind in ERRORS
        ],
        axis=1,
    )
    no_wrong = ap50(np.where(matching.verdict == Verdict.WRONG, Verdict.IGNORED, matching.verdict), held) - plain
    none_lost = ap50(matching.verdict, hit) - plain

    def group(name: str) -> GroupErrors:
        part = group_labels(protocol, name)
        there, got = int(held[part].sum()), int(hit[part].sum())
        return GroupErrors(
            group_mean(plain, protocol, name),
            there,
            got,
            dict(zip(ERRORS, counts[part].sum(axis=0).tolist(), strict=True)),
            {kind: group_mean(column, protocol, name) for kind, column in zip(ERRORS, gains.T, strict=True)},
            int(wrong[part].sum()),
            there - got,
            group_mean(no_wrong, protocol, name),
            group_mean(none_lost, protocol, name),
        )

    return ErrorBreakdown(
        protocol,
        {name: group(name) for name in groups_of(protocol)},
        _misnamed(found, objects, errors, protocol),
        counts,
        gains,
    )


def _misnamed(found: Found, objects: Objects, errors: Errors, protocol: Protocol) -> dict[str, dict[str, int]]:
    wrong = errors.kind == Kind.CLASSIFICATION
    truth_novel = objects.labels[errors.item[wrong]] >= len(protocol.base)
    named_novel = found.labels[wrong] >= len(protocol.base)
    return {
        truth: {
            named: int(((truth_novel == (truth == "novel")) & (named_novel == (named == "novel"))).sum())
            for named in ("novel", "base")
        }
        for truth in ("novel", "base")
    }
