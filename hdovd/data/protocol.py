"""Which classes are base and which are novel, how AP is counted (METHOD section 1), and the groups of classes that
every metric is stated for.

A protocol is a small TOML file: `name`, `base`, `novel`, and optionally `min_image_side_px`, `max_detections`,
`keep_empty_train`, `keep_empty_val`, `federated`, `metric` and `groups`. `ov-coco` and `ov-lvis` ship with the package.
Category order is base 0..Kb-1, then novel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.text_files import checked_name, cut, read_shipped, shipped, shown

if TYPE_CHECKING:
    import numpy as np


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

    name: str
    base: tuple[str, ...]
    novel: tuple[str, ...]
    min_image_side_px: int = 32
    max_detections: tuple[int, ...] = (100, 300, 1000)
    keep_empty_train: bool = False
    keep_empty_val: bool = False
    federated: bool = False
    metric: str = "ap50"
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

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
        return {
            "name": self.name,
            "base": list(self.base),
            "novel": list(self.novel),
            "min_image_side_px": self.min_image_side_px,
            "max_detections": list(self.max_detections),
        } | {name: _plain(getattr(self, name)) for name in _LATER if getattr(self, name) != _DEFAULTS[name]}


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Protocol) if f.default is not MISSING} | {"groups": {}}
_SWITCHES = ("keep_empty_train", "keep_empty_val", "federated")
_LATER = (*_SWITCHES, "metric", "groups")
METRICS = {"ap50": "AP50", "ap": "AP"}
GROUPS = ("novel", "base", "all")  # of every protocol


def _plain(value: Any) -> Any:
    return {name: list(names) for name, names in value.items()} if isinstance(value, Mapping) else value


def shipped_protocols() -> list[str]:
    return shipped("protocols")


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
    unknown = sorted(values.keys() - {"name", "base", "novel", *_DEFAULTS})
    missing = sorted({"name", "base", "novel"} - values.keys())
    if unknown or missing:
        raise HdovdError(f"unknown keys [{cut(', '.join(unknown))}], missing keys {missing}; needed: name, base, novel")
    for key in ("base", "novel"):
        if not isinstance(values[key], list | tuple):
            raise HdovdError(f"{key} must be a list of class names, not {shown(values[key])}")
        for place, name in enumerate(values[key]):
            checked_name(name, f"{key} must be a list of class names: number {place}")
    names = [*values["base"], *values["novel"]]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not values["base"]:
        raise HdovdError(f"named twice: {shorten(list(twice))}" if twice else "base holds no class name")
    settings = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    side, dets = settings["min_image_side_px"], settings["max_detections"]
    if (
        type(side) is not int
        or not isinstance(dets, list | tuple)
        or not dets
        or not all(type(d) is int and d > 0 for d in dets)
    ):
        raise HdovdError(
            f"min_image_side_px must be a whole number and max_detections a list of them: {cut(f'{side!r}, {dets!r}')}"
        )
    switches = [settings[switch] for switch in _SWITCHES]
    if not all(isinstance(switch, bool) for switch in switches):
        raise HdovdError(f"{' and '.join(_SWITCHES)} must be true or false: {cut(repr(switches))}")
    if settings["metric"] not in [*METRICS]:  # a list is no key
        raise HdovdError(f"metric is {shown(settings['metric'])}, expected {' or '.join(METRICS)}")
    settings |= {"max_detections": tuple(dets), "groups": _groups(settings["groups"], names)}
    return Protocol(checked_name(values["name"], "name"), tuple(values["base"]), tuple(values["novel"]), **settings)


def _groups(given: Any, names: list[str]) -> dict[str, tuple[str, ...]]:
    """The groups of a protocol of the classes `names`. Raises HdovdError."""
    if not isinstance(given, Mapping):
        raise HdovdError(f"groups must be a table of lists of class names, not {shown(given)}")
    known = set(names)
    for group, own in given.items():
        if checked_name(group, "groups: a name") in GROUPS:
            raise HdovdError(f"groups: every protocol has a group {group!r} already: give it another name")
        if not isinstance(own, list | tuple) or not own or not all(isinstance(name, str) for name in own):
            raise HdovdError(f"groups: {cut(group)} must be a list of class names, not {shown(own)}")
        if strange := [name for name in own if name not in known]:
            raise HdovdError(f"groups: {cut(group)} holds {shorten(strange)}, neither base nor novel classes")
        if len(set(own)) < len(own):
            raise HdovdError(f"groups: {cut(group)} names a class twice")
    return {group: tuple(own) for group, own in given.items()}


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
