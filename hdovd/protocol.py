"""Which classes are base and which are novel, and how AP is counted (METHOD section 1).

A protocol is a small TOML file: `name`, `base`, `novel`, and optionally `min_image_side_px` and
`max_detections`. `ov-coco` ships with the package. Category order is base 0..Kb-1, then novel.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from hdovd.errors import HdovdError, is_file


@dataclass(frozen=True, slots=True)
class Protocol:
    """A base/novel split and its evaluation settings.

    `min_image_side_px`: training images with a shorter side are dropped.
    `max_detections`: COCOeval's maxDets; AP is read at the last of them.
    """

    name: str
    base: tuple[str, ...]
    novel: tuple[str, ...]
    min_image_side_px: int = 32
    max_detections: tuple[int, ...] = (100, 300, 1000)

    @property
    def names(self) -> tuple[str, ...]:
        """All class names, base before novel: the label of a class is its place here."""
        return self.base + self.novel

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "base": list(self.base), "novel": list(self.novel),
                "min_image_side_px": self.min_image_side_px, "max_detections": list(self.max_detections)}


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Protocol) if f.default is not MISSING}


def shipped_protocols() -> list[str]:
    return sorted(p.name.removesuffix(".toml") for p in resources.files("hdovd").joinpath("protocols").iterdir()
                  if p.name.endswith(".toml"))


def load_protocol(name_or_file: str) -> Protocol:
    """A shipped protocol by name, or one from a TOML file.

    Raises HdovdError if there is no such protocol, or if the file is not a valid one.
    """
    if name_or_file in shipped_protocols():
        content = resources.files("hdovd").joinpath("protocols", f"{name_or_file}.toml").read_bytes()
    elif is_file(name_or_file):
        content = Path(name_or_file).read_bytes()
    else:
        raise HdovdError(f"no protocol {name_or_file!r}: give one of {', '.join(shipped_protocols())}, or a TOML file "
                         "with name = \"...\", base = [...] and novel = [...]")
    try:
        return parse_protocol(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, HdovdError) as error:
        raise HdovdError(f"protocol {name_or_file}: {error}") from error


def parse_protocol(values: dict[str, Any]) -> Protocol:
    """A protocol from plain values, checked. Raises HdovdError."""
    unknown = sorted(values.keys() - {"name", "base", "novel", *_DEFAULTS})
    missing = sorted({"name", "base", "novel"} - values.keys())
    if unknown or missing:
        raise HdovdError(f"unknown keys {unknown}, missing keys {missing}; needed: name, base, novel")
    for key in ("base", "novel"):
        if not isinstance(values[key], list | tuple) or not all(isinstance(n, str) and n for n in values[key]):
            raise HdovdError(f"{key} must be a list of class names, not {values[key]!r}")
    names = [*values["base"], *values["novel"]]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or not values["base"]:
        raise HdovdError(f"named twice: {twice}" if twice else "base holds no class name")
    side, dets = (values.get(key, default) for key, default in _DEFAULTS.items())
    if not isinstance(side, int) or not isinstance(dets, list | tuple) or not dets or not all(isinstance(d, int) and d > 0 for d in dets):
        raise HdovdError(f"min_image_side_px must be a whole number and max_detections a list of them: {side!r}, {dets!r}")
    return Protocol(str(values["name"]), tuple(values["base"]), tuple(values["novel"]), side, tuple(dets))
