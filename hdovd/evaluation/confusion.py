"""Which class is taken for which, at a score threshold. K classes in label order.

Detections of `threshold` or more, best first, take in each image the object, of those still free, that they overlap
most by IoU 0.5 or more, whatever its class (of equals the one of their own class): COCOeval's rule without classes.
What takes an object counts in the row of its class and the column of the detection's; what takes none counts in the row
"background", unless it lies in a crowd of its own class; what is taken by none counts in the column "missed".
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hdovd.data.protocol import Protocol
from hdovd.evaluation.groups import group_of
from hdovd.evaluation.matching import Found, Objects, Overlaps, take


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """`count` objects of class `truth` were taken for `named`, a `share` (0..1) of its objects. Groups: "novel" or
    "base".
    """

    truth: str
    truth_group: str
    named: str
    named_group: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """`counts` (K+1, K+1) int64: rows are objects' classes and then "background", columns detections' classes and then
    "missed"; the last corner is 0. A row of a class sums to its objects.
    """

    protocol: Protocol
    threshold: float
    counts: np.ndarray

    def top(self, most: int = 20) -> list[ConfusedPair]:
        """The commonest confusions of two classes, background and missed aside; of equals in label order."""
        names, protocol = self.protocol.names, self.protocol
        between = self.counts[:-1, :-1].copy()
        np.fill_diagonal(between, 0)
        order = np.argsort(-between, axis=None, kind="stable")[:most]
        objects = self.counts.sum(axis=1)
        return [
            ConfusedPair(
                names[t],
                group_of(t, protocol),
                names[d],
                group_of(d, protocol),
                int(between[t, d]),
                float(between[t, d] / objects[t]),
            )
            for t, d in zip(*(rows.tolist() for rows in np.unravel_index(order, between.shape)), strict=True)
            if between[t, d]
        ]

    def to_tree(self) -> dict[str, Any]:
        """`{"threshold", "rows": [names, "background"], "columns": [names, "missed"], "counts": rows, "top":
        [ConfusedPair]}`.
        """
        names = list(self.protocol.names)
        return {
            "threshold": self.threshold,
            "rows": [*names, "background"],
            "columns": [*names, "missed"],
            "counts": self.counts.tolist(),
            "top": [asdict(pair) for pair in self.top()],
        }


def confusion(found: Found, objects: Objects, overlaps: Overlaps, protocol: Protocol, threshold: float) -> Confusion:
    """Count what is taken for what among the detections scored `threshold` or more."""
    classes = len(protocol.names)
    shown = found.scores >= threshold
    own = found.labels[overlaps.detection] == objects.labels[overlaps.item]
    able = shown[overlaps.detection] & (own | ~objects.crowd[overlaps.item])
    taker, taken = take(objects, overlaps, able, np.argsort(-found.scores, kind="stable"), own)
    alone = shown.copy()
    alone[taker] = False
    missed = ~objects.crowd
    missed[taken] = False
    took_object = ~objects.crowd[taken]
    counts = np.zeros((classes + 1, classes + 1), np.int64)
    np.add.at(counts, (objects.labels[taken[took_object]], found.labels[taker[took_object]]), 1)
    np.add.at(counts[-1], found.labels[alone], 1)
    np.add.at(counts[:, -1], objects.labels[missed], 1)
    return Confusion(protocol, threshold, counts)
