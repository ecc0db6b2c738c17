"""The values of recipes by dotted key: told apart, named shortly, and shown."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hdovd.cache.identity import short
from hdovd.config.recipe import Recipe

SWITCH = ".enabled"
SHOWN = 28  # characters of a value in a table

Settings = dict[str, Any]


def lasting_values(recipe: Recipe) -> dict[str, Any]:
    """What a run may not change on its way. It may change how it is computed (workers, compiled or not) and the values
    of another stage.
    """
    return recipe.model_dump(by_alias=True, exclude={"train": {"workers", "compile"}, "proposals": True})


def flat(tree: Mapping[str, Any], prefix: str = "") -> Settings:
    """The leaves of a tree of plain values, by dotted key, in its order."""
    leaves: Settings = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def value_at(tree: Any, key: str) -> Any:
    """What stands in a tree of plain values at a dotted key; None where there is no such thing."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def pair_lines(tree: Mapping[str, Any]) -> list[str]:
    """A line for each value of a tree by its dotted key, long ones cut; what is not set is left out."""
    pairs = {key: value for key, value in flat(tree).items() if value is not None}
    width = max(map(len, pairs), default=0)
    return [f"  {key:{width}s}  {_text(value)}" for key, value in pairs.items()]


def different_keys(many: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that not all of the settings hold with the same value, in the order of their first mention."""
    keys = dict.fromkeys(key for settings in many for key in settings)
    # by their text: 1 == True
    return [key for key in keys if len({repr(one[key]) if key in one else None for one in many}) > 1]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) where they differ; None where one has no such key."""
    return [(key, a.get(key), b.get(key)) for key in different_keys([a, b])]


def short_names(keys: Iterable[str], among: Iterable[str]) -> dict[str, str]:
    """The shortest ending of every key that no other of `among` ends with: train.lr is lr, loss.image.enabled is image.

    The names do not depend on which keys are asked for, so that they stay the same when an ablation grows by one.
    """
    wanted = list(keys)
    others = {key.removesuffix(SWITCH) for key in (*among, *wanted)}
    return {key: _ending(key.removesuffix(SWITCH), others) for key in wanted}


def shown_apart(values: Sequence[Any]) -> list[str]:
    """The values of one column: whole where the short forms of two that differ would be the same."""
    short = [shown(value) for value in values]
    return [
        in_full(value)
        if any(text == other and repr(value) != repr(value_2) for other, value_2 in zip(short, values, strict=True))
        else text
        for text, value in zip(short, values, strict=True)
    ]


def in_full(value: Any) -> str:
    """A value: on and off for booleans."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-" if value is None else str(value)


def shown(value: Any) -> str:
    """A value in a table, cut: of a path its end."""
    text = f"{value:g}" if isinstance(value, float) else in_full(value)
    if len(text) > SHOWN and "/" in text:
        text = PurePath(text).name
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else short(value)
    return text + (f" ({len(value)} entries)" if isinstance(value, list) and text.endswith("...") else "")


def _ending(key: str, others: set[str]) -> str:
    parts, rivals = key.split("."), others - {key}
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in endings if not any(f".{other}".endswith(f".{end}") for other in rivals)), key)
