"""What made a level, as plain values, and the key that follows from them.

Two levels with the same key hold the same bytes. `differences` says in words why two do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.cache.schema import Level, Source
from hdovd.core import HdovdError

if TYPE_CHECKING:
    import numpy as np

KeyInputs = dict[str, Any]
SEAL = "sha256"  # of all else in a JSON file
SHOWN = 120  # characters of a value in a message


def key_of(inputs: KeyInputs) -> str:
    """The key of a level: a hash of its inputs, which must be JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:24]


def sealed(tree: KeyInputs) -> KeyInputs:
    """JSON values with a checksum of their own, under SEAL."""
    rest = {name: value for name, value in tree.items() if name != SEAL}
    return rest | {SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def require_seal(tree: KeyInputs) -> None:
    """Raises ValueError if values are not those that were sealed; those of older versions have no seal, and pass."""
    if SEAL in tree:
        sound = _is_seal(tree, SEAL)
    else:  # of an older version; or the name of the seal is damaged
        sound = not any(_is_seal(tree, name) for name in tree)
    if not sound:
        raise ValueError("its checksum is another one: it was changed since it was written")


def _is_seal(tree: KeyInputs, name: str) -> bool:
    """Whether the value of a name is the checksum of all others."""
    rest = {other: value for other, value in tree.items() if other != name}
    return isinstance(tree[name], str) and len(tree[name]) == 64 and tree[name] == sealed(rest)[SEAL]


def hash_tables(tables: Iterable[np.ndarray]) -> str:
    """A hash of arrays, by dtype, shape and content."""
    import numpy as np  # here: most of this file, and what the command line needs of it, is of plain values

    digest = hashlib.sha256()
    for table in tables:
        digest.update(f"{table.dtype.str}{table.shape}".encode())
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()[:24]


def hash_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def hash_file(file: Path) -> str:
    """The sha256 of a file's bytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _source_inputs(tables: Mapping[str, np.ndarray], source: Source) -> KeyInputs:
    """The boxes of one source: how many an image has, where, and annotation ids or scores."""
    import numpy as np

    mask = tables["source"] == source
    before = np.concatenate([[0], np.cumsum(mask)])
    column = tables["annotation_id" if source is Source.BASE_BOX else "score"]
    return {
        "count": int(mask.sum()),
        "hash": hash_tables([np.diff(before[tables["offset"]]), tables["box"][mask], column[mask]]),
    }


def table_inputs(level: Level, tables: Mapping[str, np.ndarray]) -> KeyInputs:
    """The part of a level's inputs that follows from its tables: which images, of what name and size; where the boxes
    are, and how many an image has.
    """

    def said(counted: str, *columns: str) -> KeyInputs:
        return {"count": len(tables[counted]), "hash": hash_tables(tables[column] for column in columns)}

    return {
        **({"images": said("image_id", "image_id", "image_hash")} if "image_id" in tables else {}),
        **({"boxes": said("box", "offset", "box")} if "box" in tables else {}),
        **({"base_boxes": _source_inputs(tables, Source.BASE_BOX)} if level is Level.BOXES else {}),
        **({"proposals": _source_inputs(tables, Source.PROPOSAL)} if level is Level.BOXES else {}),
    }


def differences(
    expected: KeyInputs, found: KeyInputs, prefix: str = "", *, sides: tuple[str, str] = ("expected", "the cache has")
) -> list[str]:
    """A line for every input that differs, nested values by their path. `sides`: how a line speaks of the two."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        a, b = expected.get(name), found.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{name}.", sides=sides)
        elif a != b and not (
            name == "hash" and expected.get("count") != found.get("count")
        ):  # the count says it already
            lines.append(
                f"{prefix}{name} differs: {sides[0]} {short(a)}, {sides[1]} {short(b)}{_first_difference(a, b)}"
            )
    return lines


def require_same(
    expected: KeyInputs,
    found: KeyInputs,
    what: str,
    advice: str = "",
    *,
    sides: tuple[str, str] = ("expected", "the cache has"),
) -> None:
    """Raises HdovdError unless inputs are the same: `what` is wrong, a line for every difference, and `advice`."""
    if lines := differences(expected, found, sides=sides):
        raise HdovdError("\n  ".join([f"{what}:", *lines]) + (advice and f"\n{advice}"))


def short(value: Any) -> str:
    """A value of the inputs as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _first_difference(a: Any, b: Any) -> str:
    """Where two lists differ first, if what is shown of them does not say it."""
    if not (isinstance(a, list) and isinstance(b, list)) or max(len(json.dumps(a)), len(json.dumps(b))) <= SHOWN:
        return ""
    at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    first, second = (short(values[at]) if at < len(values) else "nothing" for values in (a, b))
    return f" ({len(a)} and {len(b)} entries, the first that differs is entry {at}: {first} and {second})"
