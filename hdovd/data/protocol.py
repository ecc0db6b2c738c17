"""Which classes are base and which are novel, how AP is counted (METHOD section 1), and the groups of classes that
every metric is stated for.

A protocol is a small TOML file: `name`, `base`, `novel`, and optionally `min_image_side_px`, `max_detections`,
`keep_empty_train`, `keep_empty_val`, `federated`, `metric` and `groups`. `ov-coco` and `ov-lvis` ship with the package.
Category order is base 0..Kb-1, then novel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError

from hdovd.core import HdovdError, shorten
from hdovd.core.text_files import checked_name, cut, read_shipped, shown

if TYPE_CHECKING:
    import numpy as np

METRICS = {"ap50": "AP50", "ap": "AP"}
GROUPS = ("novel", "base", "all")  # of every protocol
Name = Annotated[str, AfterValidator(partial(checked_name, where="a name in it"))]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A base/novel split and its evaluation settings.

    `min_image_side_px`: training images with a shorter side are dropped.
    `max_detections`: COCOeval's maxDets; AP is read at the last of them.
    `keep_empty_train`, `keep_empty_val`: whether images without an object of the (base) classes are trained and
    evaluated on.
    `federated`: whether annotations say of each image which classes they know of, as LVIS's do; AP is counted as LVIS
    counts it, and the largest of `max_detections` is that of an image, all classes together.
    `metric`: what tables of several runs show, "ap50" or "ap".
    `groups`: other groups of classes that metrics are stated for, by name; tables show them in place of novel and base.
    """

    name: Name
    base: Names
    novel: tuple[Name, ...]
    min_image_side_px: StrictInt = 32
    max_detections: Annotated[tuple[Annotated[StrictInt, Field(gt=0)], ...], Field(min_length=1)] = (100, 300, 1000)
    keep_empty_train: StrictBool = False
    keep_empty_val: StrictBool = False
    federated: StrictBool = False
    metric: Literal["ap50", "ap"] = "ap50"
    groups: Mapping[Name, Names] = field(default_factory=dict, hash=False)
    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    @property
    def names(self) -> tuple[str, ...]:
        """All class names, base before novel: the label of a class is its place here."""
        return self.base + self.novel

    def all_base(self) -> Protocol:
        """The same classes by the same labels, none of them novel: what an oracle is trained on."""
        return replace(self, base=self.names, novel=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what has a default only where it has another value, since records of before it was there have
        none.
        """
        always = ("name", "base", "novel", "min_image_side_px", "max_detections")
        every, others = (_VALUES.dump_python(self, mode="json", exclude_defaults=left) for left in (False, True))
        return {key: every[key] for key in always} | dict(others)


_VALUES = TypeAdapter(Protocol)


def load_protocol(name_or_file: str) -> Protocol:
    """A shipped protocol by name, or one from a TOML file.

    Raises HdovdError if there is no such protocol, or if the file is not a valid one.
    """
    tree = read_shipped(name_or_file, "protocol", ' with name = "...", base = [...] and novel = [...]')
    try:
        return parse_protocol(tree)
    except HdovdError as error:
        raise HdovdError(f"protocol {name_or_file}: {error}") from error


def parse_protocol(values: dict[str, Any]) -> Protocol:
    """A protocol from plain values, checked. Raises HdovdError."""
    try:
        found = _VALUES.validate_python(values)
    except ValidationError as error:
        lines = [
            f"{cut('.'.join(map(str, e['loc'])), 80)}"
            + (": " if e["type"] == "missing" else f" is {shown(e['input'])}: ")
            + cut(e["msg"])
            for e in error.errors()[:3]
        ]
        raise HdovdError(f"{'; '.join(lines)}. It has {', '.join(Protocol.__slots__)}") from error
    known = Counter(found.names)
    if twice := sorted(name for name, count in known.items() if count > 1):
        raise HdovdError(f"named twice: {shorten(list(twice))}")
    for group, own in found.groups.items():
        if group in GROUPS:
            raise HdovdError(f"groups: every protocol has a group {group!r} already: give it another name")
        if strange := [name for name in own if name not in known]:
            raise HdovdError(f"groups: {cut(group)} holds {shorten(strange)}, neither base nor novel classes")
        if len(set(own)) < len(own):
            raise HdovdError(f"groups: {cut(group)} names a class twice")
    return found


# --- groups of classes ---


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
