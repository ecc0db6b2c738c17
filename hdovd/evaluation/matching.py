"""Which detection found which object, as COCOeval decides it, at one IoU; and what is counted from that, beyond AP:
precision by recall, rightness by score, and which class is taken for which. Of class-agnostic boxes, at several IoUs,
their average recall.

D detections, G objects, P overlapping pairs of them; T IoU thresholds; K classes in label order. Precision is in 0..1;
AP50 in percent. Boxes are (x, y, width, height) float64 in
pixels of the original image, as the files have them: from corners the IoU would differ in its last bits, and with it,
now and then, a match. Those of recall, which are of one image, are corners.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from hdovd.data import Protocol, group_labels, group_of, groups_of

IOU = 0.5  # at which a detection is right: AP50
LEAST_IOU = 0.1  # below it nothing is asked of a pair (TIDE's background threshold)
PAIRS_AT_ONCE = 1 << 19  # bounds the memory, some 200 bytes a pair


@dataclass(frozen=True, slots=True)
class Objects:
    """Ground truth, flat: `image_ids` (G,), `boxes` (G, 4), `labels` (G,), `crowd` (G,) bool: not one object, asks and
    answers nothing. `judged`: where annotations are federated, which classes they know of.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    judged: "Judged | None" = None


@dataclass(frozen=True, slots=True)
class Judged:
    """The classes that federated annotations know to be in an image or not to be (LVIS, arXiv 1908.03195, section 3):
    `image_ids` (I,) in ascending order, `classes` (I, K) bool.
    """

    image_ids: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True, slots=True)
class Found:
    """Detections, flat, in any order: `image_ids` (D,), `boxes` (D, 4), `labels` (D,), `scores` (D,)."""

    image_ids: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Pairs of one image that overlap by `LEAST_IOU` or more, whatever their classes: places `detection` (P,) and
    `item` (P,) in `Found` and `Objects`, and `iou` (P,); with a crowd it is the share of the detection that lies in it.
    Sorted by both places.
    """

    detection: np.ndarray
    item: np.ndarray
    iou: np.ndarray


class Verdict(IntEnum):
    """On a detection. IGNORED: it lies in a crowd of its class, beyond the cap on detections, or is of a class that is
    not judged in its image; AP does not count it."""

    WRONG = 0
    RIGHT = 1
    IGNORED = 2


@dataclass(frozen=True, slots=True)
class Matching:
    """`verdict` (D,) of `Verdict`; `item` (D,): the object, or crowd, that a detection took, or -1; `finder` (G,): the
    detection that found an object, or -1, always so for crowds; `rank` (D,): places of detections, class by class, best
    first.
    """

    verdict: np.ndarray
    item: np.ndarray
    finder: np.ndarray
    rank: np.ndarray


def find_overlaps(found: Found, objects: Objects) -> Overlaps:
    """All pairs of a detection and an object, or crowd, of its image that overlap."""
    by_image = np.argsort(objects.image_ids, kind="stable")
    ids = objects.image_ids[by_image]
    first = np.searchsorted(ids, found.image_ids, "left")
    count = np.searchsorted(ids, found.image_ids, "right") - first
    parts = []
    for some in np.split(np.arange(len(count)), np.flatnonzero(np.diff(np.cumsum(count) // PAIRS_AT_ONCE)) + 1):
        counts = count[some]
        detection = np.repeat(some, counts)
        item = by_image[first[detection] + (np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts))]
        iou = paired_ious(found.boxes[detection], objects.boxes[item], objects.crowd[item])
        near = iou >= LEAST_IOU
        parts.append((detection[near], item[near], iou[near]))
    return Overlaps(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def paired_ious(one: np.ndarray, two: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(P, 4), (P, 4) -> (P,) in the order of operations of pycocotools, so that the last bit is its own."""
    sides = np.minimum(one[:, :2] + one[:, 2:], two[:, :2] + two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])
    meet = (sides > 0).all(axis=1)
    shared = sides[:, 0] * sides[:, 1]
    area = one[:, 2] * one[:, 3]
    union = np.where(crowd, area, area + two[:, 2] * two[:, 3] - shared)
    return np.asarray(np.divide(shared, union, out=np.zeros(len(one)), where=meet))


def match(found: Found, objects: Objects, overlaps: Overlaps, most: int) -> Matching:
    """COCOeval's rule: in each image and class every detection in turn, best first, takes the object, of those still
    free, that it overlaps most; else a crowd, which is never used up.

    Args:
        most: as of `counted`.
    """
    rank = ranking(found.labels, found.scores, found.image_ids)
    verdict = np.where(counted(found, objects, most), Verdict.WRONG, Verdict.IGNORED).astype(np.int8)
    own = found.labels[overlaps.detection] == objects.labels[overlaps.item]
    taker, taken = take(objects, overlaps, own & (verdict[overlaps.detection] == Verdict.WRONG), rank, own)
    of_crowd = objects.crowd[taken]
    verdict[taker] = np.where(of_crowd, Verdict.IGNORED, Verdict.RIGHT)
    items, finder = np.full(len(rank), -1), np.full(len(objects.labels), -1)
    items[taker] = taken
    finder[taken[~of_crowd]] = taker[~of_crowd]
    return Matching(verdict, items, finder, rank)


def ranking(labels: np.ndarray, scores: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
    """(D,) places, class by class, best first; of equal scores by image id and then as they come: COCOeval's order."""
    return np.lexsort((image_ids, -scores, labels))


def take(
    objects: Objects, overlaps: Overlaps, able: np.ndarray, rank: np.ndarray, preferred: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every detection takes the free object that it overlaps most; if there is none, a crowd, which stays free.

    Args:
        able: (P,) bool, the pairs that may go together if they overlap by `IOU`. rank: (D,) detections in their turn.
        preferred: (P,) bool, which of equal overlaps is taken; of several the last.

    Returns:
        Detections that took something, in their turn, and what.
    """
    pair = np.flatnonzero(able & (overlaps.iou >= IOU))
    turn, crowd = np.argsort(rank), objects.crowd[overlaps.item]
    pair = pair[np.lexsort((overlaps.item[pair], preferred[pair], crowd[pair], turn[overlaps.detection[pair]]))]
    columns = (overlaps.detection[pair], overlaps.item[pair], overlaps.iou[pair], crowd[pair])
    used: set[int] = set()
    took: list[tuple[int, int]] = []
    for d, candidates in groupby(zip(*(one.tolist() for one in columns), strict=True), key=itemgetter(0)):
        best, best_iou, best_is_crowd = -1, 0.0, True
        for _, g, overlap, is_crowd in candidates:
            if is_crowd and not best_is_crowd:
                break  # it has an object
            if overlap >= best_iou and g not in used:
                best, best_iou, best_is_crowd = g, overlap, is_crowd
        if best >= 0:
            took.append((d, best))
            if not best_is_crowd:
                used.add(best)
    both = np.array(took, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def counted(found: Found, objects: Objects, most: int) -> np.ndarray:
    """(D,) bool, which detections AP counts: the `most` best of their class and image (COCOeval's maxDets). Where
    annotations are federated: the `most` best of their image, if their class is judged there (LVIS).
    """
    group = found.labels if objects.judged is None else np.zeros_like(found.labels)
    order = np.lexsort((-found.scores, group, found.image_ids))
    same = np.zeros(len(order), bool)
    same[1:] = (np.diff(found.image_ids[order]) == 0) & (np.diff(group[order]) == 0)
    place = np.arange(len(order))
    within = np.zeros(len(order), bool)
    within[order] = place - np.maximum.accumulate(np.where(same, 0, place)) < most
    if objects.judged is not None:
        row = np.searchsorted(objects.judged.image_ids, found.image_ids)
        within &= objects.judged.classes[row, found.labels]
    return within


# --- precision at 101 recalls, as COCOeval counts it at IoU 0.5: its mean is AP50 ---

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Curves:
    """`precision` (K, 101): the highest precision at a recall or beyond, 0 where it is not reached, NaN for a class
    without objects. `scores` (K, 101): of the detection that reaches it; take it as the threshold that gives this
    recall. 0 where it is not reached.
    """

    protocol: Protocol
    precision: np.ndarray
    scores: np.ndarray

    def ap50(self) -> np.ndarray:
        """(K,) percent, NaN for a class without objects."""
        return np.asarray(self.precision.mean(axis=1) * 100)

    def group(self, group: str) -> np.ndarray | None:
        """(101,) mean precision over the classes of a group that have objects; None if none has."""
        rows = self.precision[group_labels(self.protocol, group)]
        rows = rows[~np.isnan(rows[:, 0])]
        return rows.mean(axis=0) if len(rows) else None

    def to_tree(self) -> dict[str, Any]:
        """`{"recall": [101], "groups": {group: [101] or None}, "classes": {name: {"precision": [101], "scores": [101]}
        or None}}`.
        """
        return {
            "recall": _rounded(RECALLS),
            "groups": {
                group: None if (line := self.group(group)) is None else _rounded(line)
                for group in groups_of(self.protocol)
            },
            "classes": {
                name: None if np.isnan(precision[0]) else {"precision": _rounded(precision), "scores": _rounded(scores)}
                for name, precision, scores in zip(self.protocol.names, self.precision, self.scores, strict=True)
            },
        }


def precision_curves(found: Found, objects: Objects, matching: Matching, protocol: Protocol) -> Curves:
    """The curves of a run's detections as they are."""
    ranked = matching.rank
    held = np.bincount(objects.labels[~objects.crowd], minlength=len(protocol.names))
    return Curves(protocol, *curves_of(found.labels[ranked], found.scores[ranked], matching.verdict[ranked], held))


def curves_of(
    labels: np.ndarray, scores: np.ndarray, verdict: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and score at each recall: two (K, 101).

    Args:
        labels, scores, verdict: (D,) class by class, best first. objects: (K,) that there are to find.
    """
    precision, reached = np.full((len(objects), len(RECALLS)), np.nan), np.full((len(objects), len(RECALLS)), np.nan)
    bounds = np.searchsorted(labels, np.arange(len(objects) + 1))
    for label, count in enumerate(objects.tolist()):
        if not count:
            continue
        part = slice(bounds[label], bounds[label + 1])
        right = np.cumsum(verdict[part] == Verdict.RIGHT, dtype=np.float64)
        wrong = np.cumsum(verdict[part] == Verdict.WRONG, dtype=np.float64)
        values = right / (right + wrong + np.spacing(1))  # with COCOeval's guard against 0 / 0
        values = np.append(np.maximum.accumulate(values[::-1])[::-1], 0.0)
        at = np.searchsorted(right / count, RECALLS, "left")
        precision[label], reached[label] = values[at], np.append(scores[part], 0.0)[at]
    return precision, reached


def _rounded(values: np.ndarray) -> list[float]:
    return [round(v, 5) for v in values.tolist()]


# --- do scores mean what they say: of detections scored 0.8, are 8 in 10 right? B bins of equal width ---


@dataclass(frozen=True, slots=True)
class Reliability:
    """Detections of one group by score: `edges` (B+1,); `counts` (B,); `mean_scores` (B,) and `precisions` (B,), the
    share that is right at IoU 0.5, NaN in an empty bin. Ignored detections are left out. `calibration_error`: the
    expected one, the mean over detections of
    |precision - mean score| of their bin (Naeini et al., 2015); None without detections.
    """

    edges: np.ndarray
    counts: np.ndarray
    mean_scores: np.ndarray
    precisions: np.ndarray
    calibration_error: float | None

    def to_tree(self) -> dict[str, Any]:
        """The fields as lists; NaN as None."""
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "mean_scores": [None if np.isnan(v) else v for v in self.mean_scores.tolist()],
            "precisions": [None if np.isnan(v) else v for v in self.precisions.tolist()],
            "calibration_error": self.calibration_error,
        }


def score_reliability(scores: np.ndarray, right: np.ndarray, bins: int = 10) -> Reliability:
    """Scores (n,) in 0..1 against whether the detections are right (n,) bool. A score on an edge belongs to the bin
    above it, 1 to the last.
    """
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, scores, "right") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    held = np.maximum(counts, 1)
    means = np.where(counts > 0, np.bincount(place, scores, bins) / held, np.nan)
    precisions = np.where(counts > 0, np.bincount(place, right, bins) / held, np.nan)
    error = float(np.nansum(counts * np.abs(precisions - means)) / len(scores)) if len(scores) else None
    return Reliability(edges, counts, means, precisions, error)


# --- confusion ---


@dataclass(frozen=True, slots=True)
class Confusion:
    """`counts` (K+1, K+1) int64: rows are objects' classes and then "background", columns detections' classes and then
    "missed"; the last corner is 0. A row of a class sums to its objects.
    """

    protocol: Protocol
    threshold: float
    counts: np.ndarray

    def top(self, most: int = 20) -> list[dict[str, Any]]:
        """The commonest confusions of two classes, background and missed aside; of equals in label order: `count`
        objects of class `truth` were taken for `named`, a `share` (0..1) of its objects. Groups: "novel" or "base".
        """
        names, protocol, objects = self.protocol.names, self.protocol, self.counts.sum(axis=1)
        between = self.counts[:-1, :-1] * ~np.eye(len(names), dtype=bool)
        order = np.argsort(-between, axis=None, kind="stable")[:most]
        return [
            {
                "truth": names[t],
                "truth_group": group_of(t, protocol),
                "named": names[d],
                "named_group": group_of(d, protocol),
                "count": int(between[t, d]),
                "share": float(between[t, d] / objects[t]),
            }
            for t, d in zip(*(rows.tolist() for rows in np.unravel_index(order, between.shape)), strict=True)
            if between[t, d]
        ]

    def to_tree(self) -> dict[str, Any]:
        """`{"threshold", "rows": [names, "background"], "columns": [names, "missed"], "counts": rows, "top":
        the pairs}`.
        """
        names = list(self.protocol.names)
        return {
            "threshold": self.threshold,
            "rows": [*names, "background"],
            "columns": [*names, "missed"],
            "counts": self.counts.tolist(),
            "top": self.top(),
        }


def confusion(found: Found, objects: Objects, overlaps: Overlaps, protocol: Protocol, threshold: float) -> Confusion:
    """Count what is taken for what among the detections scored `threshold` or more.

    Best first, they take in each image the object, of those still free, that they overlap most by IoU 0.5 or more,
    whatever its class (of equals the one of their own class): COCOeval's rule without classes. What takes an object
    counts in the row of its class and the column of the detection's; what takes none counts in the row "background",
    unless it lies in a crowd of its own class; what is taken by none counts in the column "missed". Where annotations
    are federated, detections of classes that are not judged in their image are left out.
    """
    classes = len(protocol.names)
    shown = found.scores >= threshold
    if objects.judged is not None:
        shown &= counted(found, objects, max(protocol.max_detections))
    own = found.labels[overlaps.detection] == objects.labels[overlaps.item]
    able = shown[overlaps.detection] & (own | ~objects.crowd[overlaps.item])
    taker, taken = take(objects, overlaps, able, np.argsort(-found.scores, kind="stable"), own)
    alone = np.setdiff1d(np.flatnonzero(shown), taker)
    missed = np.setdiff1d(np.flatnonzero(~objects.crowd), taken)
    took_object = ~objects.crowd[taken]
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (objects.labels[taken[took_object]], found.labels[taker[took_object]]), 1)
    np.add.at(counts[-1], found.labels[alone], 1)
    np.add.at(counts[:, -1], objects.labels[missed], 1)
    return Confusion(protocol, threshold, counts)


# --- average recall, as COCOeval counts it with useCats = 0 ---

THRESHOLDS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))
NEVER = np.iinfo(np.int64).max


def found_at(boxes: np.ndarray, objects: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """Which box found each object: every box in turn takes the object, of those still free, that it overlaps most.

    Because a box does not depend on those after it, what the first k boxes find is what is found at a place below k.

    Args:
        boxes: (D, 4) xyxy, best first. objects: (G, 4) xyxy.

    Returns:
        (T, G) int64 places of boxes from 0, NEVER for an object that was not found.
    """
    overlaps = box_ious(boxes, objects)
    found = np.full((len(thresholds), len(objects)), NEVER)
    for row, threshold in enumerate(thresholds):
        for place in np.flatnonzero((overlaps >= threshold).any(axis=1)).tolist():
            free = np.where(found[row] == NEVER, overlaps[place], -1.0)
            best = len(free) - 1 - int(free[::-1].argmax())  # of equals the last, as COCOeval
            if free[best] >= min(threshold, 1 - 1e-10):
                found[row, best] = place
    return found


def recall(found: Sequence[np.ndarray], most: int) -> np.ndarray:
    """The share of objects that the `most` best boxes of their image find, at each threshold: (T,), NaN without
    objects.

    Args:
        found: (T, G) an image, of `found_at`.
    """
    places = np.concatenate(list(found), axis=1)
    return (places < most).mean(axis=1) if places.shape[1] else np.full(len(places), np.nan)


def box_ious(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """(D, 4), (G, 4) xyxy -> (D, G) float64."""
    a, b = one.astype(np.float64)[:, None], two.astype(np.float64)[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (a, b)]
    return np.asarray(overlap / np.maximum(areas[0] + areas[1] - overlap, 1e-12))
