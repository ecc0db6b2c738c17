"""TIDE: what keeps AP50 from 100, by kind of error (Bolya et al., 2020, arXiv 2008.08115), for novel and base classes apart.

Called by `pipelines/run_analysis`. D detections, G objects, K classes. "Overlap" is the IoU with an object that is no crowd.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from hdovd.protocol import Protocol


class Kind(StrEnum):
    """What a detection is; an object that nothing found and whose finding no CLASSIFICATION or LOCALISATION error stands for is MISSED."""

    RIGHT = "right"
    CLASSIFICATION = "classification"
    LOCALISATION = "localisation"
    BOTH = "both"
    DUPLICATE = "duplicate"
    BACKGROUND = "background"
    IGNORED = "ignored"
    MISSED = "missed"  # of objects alone


ERRORS = (Kind.CLASSIFICATION, Kind.LOCALISATION, Kind.BOTH, Kind.DUPLICATE, Kind.BACKGROUND, Kind.MISSED)
KINDS = tuple(Kind)  # `Errors.kind` holds places in it


@dataclass(frozen=True, slots=True)
class Errors:
    """Every error of a run: `kind` (D,) places in `KINDS`; `item` (D,): the object that it is about, the one found if it is right, or -1;
    `mended_by` (G,): the detection that would find an object that nothing found if its class or its box were mended, or -1;
    `missed` (G,) bool: not found, and not even that."""

    kind: np.ndarray
    item: np.ndarray
    mended_by: np.ndarray
    missed: np.ndarray


@dataclass(frozen=True, slots=True)
class GroupErrors:
    """One group of classes ("novel", "base" or "all").

    `ap50`: percent, mean over its classes with objects; None if none has any. `objects`, `found`: how many there are and were found.
    `counts`: errors by kind: detections by their own class, missed objects by theirs. `gains`: AP50 that the group's mean would gain if
    all errors of that kind, of any class, were mended, and only those; None as `ap50`. `false_positives`, `false_negatives`: how many
    detections are wrong and objects not found; `false_positive_gain`, `false_negative_gain`: AP50 gained without the former, and
    without the latter."""

    ap50: float | None
    objects: int
    found: int
    counts: dict[Kind, int]
    gains: dict[Kind, float | None]
    false_positives: int
    false_negatives: int
    false_positive_gain: float | None
    false_negative_gain: float | None


@dataclass(frozen=True, slots=True)
class ErrorBreakdown:
    """`groups`: by "novel", "base" and "all". `misnamed[truth][detection]`: classification errors by the group ("novel", "base") of the
    object's class and of the name it was given. `class_counts`, `class_gains` (K, 6): of each class, by `ERRORS`; gains NaN for a class
    without objects."""

    protocol: Protocol
    groups: dict[str, GroupErrors]
    misnamed: dict[str, dict[str, int]]
    class_counts: np.ndarray
    class_gains: np.ndarray

    def to_tree(self) -> dict[str, Any]:
        """`{"groups": {group: fields of GroupErrors}, "misnamed": ..., "classes": {name: {"counts": {kind: n}, "gains": {kind: x}}}}`."""
        raise NotImplementedError
