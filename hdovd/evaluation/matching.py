"""Which detection found which object, as COCOeval decides it: at one IoU, what curves, errors and verdicts are counted
from; and of class-agnostic boxes, at several, their average recall.

D detections, G objects, P overlapping pairs of them; T IoU thresholds. Boxes are (x, y, width, height) float64 in
pixels of the original image, as the files have them: from corners the IoU would differ in its last bits, and with it,
now and then, a match. Those of recall, which are of one image, are corners.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from operator import itemgetter

import numpy as np

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
    columns = (overlaps.detection, overlaps.item, overlaps.iou, crowd)
    pairs = zip(*(column[pair].tolist() for column in columns), strict=True)
    used: set[int] = set()
    took: list[tuple[int, int]] = []
    for d, candidates in groupby(pairs, key=itemgetter(0)):
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
    federated = objects.judged is not None
    group = np.zeros_like(found.labels) if federated else found.labels
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
