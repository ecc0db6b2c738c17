"""The house in figures: statements, modules a room, and which room imports which.

    python tests/helpers/house.py

`tests/test_house.py` holds the rooms to what is printed here. A room is a package; imports inside functions count.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("hdovd", "cache", "cli", "pipelines")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for floor in FLOORS:
        for file in sorted((ROOT / floor).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[0] == "hdovd" and len(parts) > 1 and (ROOT / "hdovd" / parts[1]).is_symlink():
                continue
            name = ".".join(parts if floor == "hdovd" else ("hdovd", *parts))
            found[name.removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports."""
    known = modules()
    for node in ast.walk(known[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (
                target if target in known else node.module
                for target in targets
                if node.module in known or target in known
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def room(name: str) -> str:
    """The package that a module stands in."""
    inside = any(other.startswith(f"{name}.") for other in modules())
    return name if inside or name == "hdovd" else name.rpartition(".")[0]


def between_rooms() -> dict[tuple[str, str], list[str]]:
    """(importing room, imported room) -> the imports, as `module -> module`."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in modules():
        for target in imports(name):
            if room(name) != room(target):
                found.setdefault((room(name), room(target)), []).append(f"{name} -> {target}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left of a graph when all that nothing leads to, or that leads nowhere, is taken away again and again."""
    left = graph
    while True:
        reached = set().union(*left.values())
        inner = {
            node: targets & left.keys() for node, targets in left.items() if node in reached and targets & left.keys()
        }
        if inner == left:
            return [[node, *sorted(targets)] for node, targets in sorted(left.items())]
        left = inner


def statements() -> Counter[str]:
    """Statements by room, docstrings left out."""
    found: Counter[str] = Counter()
    for name, tree in modules().items():
        found[room(name)] += sum(isinstance(node, ast.stmt) and not _is_docstring(node) for node in ast.walk(tree))
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def main() -> None:
    found, sizes = statements(), Counter(map(room, modules()))
    print(f"{len(modules())} modules, {sum(found.values()):,d} statements in {len(sizes)} rooms")
    for name, count in found.most_common():
        print(f"{count:7,d} statements {sizes[name]:3d} modules  {name}")


if __name__ == "__main__":
    main()
