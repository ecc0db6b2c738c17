"""What a run's detections are worth, beyond AP: precision by recall, rightness by score, and which class is taken for
which.

K classes in label order. Precision is in 0..1; AP50 in percent.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hdovd.data.protocol import Protocol, group_labels, group_of, groups_of
from hdovd.evaluation.matching import Found, Matching, Objects, Overlaps, Verdict, counted, take

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
        groups = {group: self.group(group) for group in groups_of(self.protocol)}
        return {
            "recall": _rounded(RECALLS),
            "groups": {group: None if line is None else _rounded(line) for group, line in groups.items()},
            "classes": {
                name: None if np.isnan(precision[0]) else {"precision": _rounded(precision), "scores": _rounded(scores)}
                for name, precision, scores in zip(self.protocol.names, self.precision, self.scores, strict=True)
            },
        }


def precision_curves(found: Found, objects: Objects, matching: Matching, protocol: Protocol) -> Curves:
    """The curves of a run's detections as they are."""
    ranked = matching.rank
    precision, scores = curves_of(
        found.labels[ranked],
        found.scores[ranked],
        matching.verdict[ranked],
        np.bincount(objects.labels[~objects.crowd], minlength=len(protocol.names)),
    )
    return Curves(protocol, precision, scores)


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
