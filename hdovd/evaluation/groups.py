"""The groups of classes that every metric is stated for. Means are over the classes of a group that have ground
truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdovd.data.protocol import Protocol

if TYPE_CHECKING:
    import numpy as np

GROUPS = ("novel", "base", "all")


def group_of(label: int, protocol: Protocol) -> str:
    """The group of a class: "base" or "novel"."""
    return "base" if label < len(protocol.base) else "novel"


def group_slice(protocol: Protocol, group: str) -> slice:
    """The labels of the classes of a group."""
    return slice(len(protocol.base) * (group == "novel"), len(protocol.base) if group == "base" else None)


def group_mean(values: np.ndarray, protocol: Protocol, group: str) -> float | None:
    """Mean of values (K,) over the classes of a group, without those that are NaN; None if none is left."""
    counted = values[group_slice(protocol, group)]
    counted = counted[counted == counted]
    return float(counted.mean()) if len(counted) else None
