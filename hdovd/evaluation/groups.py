"""The groups of classes that every metric is stated for. Means are over the classes of a group that have ground
truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdovd.data.protocol import GROUPS as GROUPS, Protocol

if TYPE_CHECKING:
    import numpy as np


def groups_of(protocol: Protocol) -> tuple[str, ...]:
    """All groups: novel, base, all, and the protocol's own."""
    return (*GROUPS, *protocol.groups)


def shown_groups(protocol: Protocol) -> tuple[str, ...]:
    """Those that tables show: the protocol's own and all, or novel, base and all."""
    return (*protocol.groups, "all") if protocol.groups else GROUPS


def group_of(label: int, protocol: Protocol) -> str:
    """The group of a class: "base" or "novel"."""
    return "base" if label < len(protocol.base) else "novel"


def group_labels(protocol: Protocol, group: str) -> list[int]:
    """The labels of the classes of a group, in ascending order."""
    base, every = len(protocol.base), len(protocol.names)
    if group in protocol.groups:
        members = set(protocol.groups[group])
        return [label for label, name in enumerate(protocol.names) if name in members]
    return list(range(base * (group == "novel"), base if group == "base" else every))


def group_mean(values: np.ndarray, protocol: Protocol, group: str) -> float | None:
    """Mean of values (K,) over the classes of a group, without those that are NaN; None if none is left."""
    counted = values[group_labels(protocol, group)]
    counted = counted[counted == counted]
    return float(counted.mean()) if len(counted) else None
