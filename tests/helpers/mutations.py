"""JSON values changed at random, from a seed: what a stranger's file may hold."""

from __future__ import annotations

import copy
import random
from typing import Any

STRANGE: list[Any] = [
    None,
    True,
    False,
    "",
    "1",
    "3.0",
    "x" * 300,
    "\x1b[31m",
    "\ufeffa",
    "\ud800",
    "../a",
    "/",
    0,
    -1,
    1.0,
    1.5,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    1 << 31,
    1 << 63,
    -(1 << 63),
    10**400,
    [],
    [[]],
    [1, 2],
    {},
    {"a": 1},
]


def mutated(tree: Any, seed: int, changes: int = 1) -> Any:
    """A copy of JSON values in which `changes` places are another value, gone, twice there, or exchanged with one
    beside them.
    """
    rng, tree = random.Random(seed), copy.deepcopy(tree)
    for _ in range(changes):
        places = list(_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case 2:
                other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                holder[key], holder[other] = holder[other], holder[key]
            case 3 if isinstance(holder, dict):
                holder[str(rng.choice(STRANGE))[:9]] = holder.pop(key)
            case _:
                holder[key] = _near(holder[key], rng)
    return tree


def _near(value: Any, rng: random.Random) -> Any:
    """A strange value, or the same in another type."""
    if type(value) in (int, float) and rng.random() < 0.5:
        return rng.choice([str(value), float(value), [value], value + 1, -value, bool(value)])
    return copy.deepcopy(rng.choice(STRANGE))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of the tree."""
    found: list[tuple[Any, Any]] = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found.append((tree, key))
        found += _places(tree[key])
    return found
