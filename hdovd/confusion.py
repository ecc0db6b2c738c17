"""Which class is taken for which, at a score threshold. Called by `pipelines/run_analysis`. K classes in label order.

Detections of `threshold` or more, best first, take in each image the object, of those still free, that they overlap most by IoU 0.5 or
more, whatever its class (of equals the one of their own class): COCOeval's rule without classes. What takes an object counts in the row
of its class and the column of the detection's; what takes none counts in the row "background", unless it lies in a crowd of its own
class; what is taken by none counts in the column "missed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hdovd.protocol import Protocol


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """`count` objects of class `truth` were taken for `named`, a `share` (0..1) of its objects. Groups: "novel" or "base"."""

    truth: str
    truth_group: str
    named: str
    named_group: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """`counts` (K+1, K+1) int64: rows are objects' classes and then "background", columns detections' classes and then "missed"; the last
    corner is 0. A row of a class sums to its objects."""

    protocol: Protocol
    threshold: float
    counts: np.ndarray

    def top(self, most: int = 20) -> list[ConfusedPair]:
        """The commonest confusions of two classes, background and missed aside; of equals in label order."""
        raise NotImplementedError

    def to_tree(self) -> dict[str, Any]:
        """`{"threshold", "rows": [names, "background"], "columns": [names, "missed"], "counts": [[...]], "top": [fields of ConfusedPair]}`."""
        raise NotImplementedError
