"""What made a level, as plain values, and the key that follows from them.

Two levels with the same key hold the same bytes. `differences` says in words why two do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

KeyInputs = dict[str, Any]


def key_of(inputs: KeyInputs) -> str:
    """The key of a level: a hash of its inputs, which must be JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:24]


def hash_tables(tables: Iterable[np.ndarray]) -> str:
    """A hash of arrays, by dtype, shape and content."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update(f"{table.dtype.str}{table.shape}".encode())
        digest.update(np.ascontiguousarray(table).tobytes())
    return digest.hexdigest()[:24]


def hash_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def differences(expected: KeyInputs, found: KeyInputs, prefix: str = "") -> list[str]:
    """A line for every input that differs, nested values by their path."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        a, b = expected.get(name), found.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name} differs: expected {_short(a)}, the cache has {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
