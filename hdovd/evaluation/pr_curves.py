"""Precision at 101 recalls, as COCOeval counts it at IoU 0.5: its mean is AP50.

K classes in label order. Precision is in 0..1; AP50 in percent.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hdovd.data.protocol import Protocol
from hdovd.evaluation.groups import GROUPS, group_slice
from hdovd.evaluation.matching import Found, Matching, Objects, Verdict

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
        """(101,) mean precision over the classes of "novel", "base" or "all" that have objects; None if none has."""
        rows = self.precision[group_slice(self.protocol, group)]
        rows = rows[~np.isnan(rows[:, 0])]
        return rows.mean(axis=0) if len(rows) else None

    def to_tree(self) -> dict[str, Any]:
        """`{"recall": [101], "groups": {group: [101] or None}, "classes": {name: {"precision": [101], "scores": [101]}
        or None}}`.
        """
        groups = {group: self.group(group) for group in GROUPS}
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
    counts = np.bincount(objects.labels[~objects.crowd], minlength=len(protocol.names))
    precision, scores = curves_of(found.labels[ranked], found.scores[ranked], matching.verdict[ranked], counts)
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
