"""The grid of an ablation: which settings vary, and the cells that follow."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.settings import Settings, flat, in_full, short_names, value_at

SEED = "train.seed"
LONGEST = 40  # characters of a value in a folder's name
OPEN, CLOSE = "[{(", "]})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of the grid: a name that is a folder's, the values by dotted key, and the settings that make
    them.
    """

    name: str
    values: Settings
    settings: tuple[str, ...]

    def recipe(self, recipe: str, settings: Sequence[str], seed: int) -> Recipe:
        return load_recipe(recipe, [*settings, *self.settings, f"{SEED}={seed}"])


def recipe_settings(recipe: Recipe) -> Settings:
    """A recipe's values by dotted key, as its TOML names them."""
    return flat(recipe.model_dump(by_alias=True))


def cells_of(recipe: str, settings: Sequence[str], grid: Sequence[str], preset: Sequence[str] = ()) -> list[Cell]:
    """All combinations of the grid, the first key varying slowest; one cell, `recipe`, without a grid.

    `settings` and, beneath them, `preset` hold for all cells; the grid may turn on again what the preset turned off.

    Raises HdovdError for an unknown key (naming the nearest), a wrong value, a key given twice, and cells that are the
    same.
    """
    keys = dict(_key_and_values(item) for item in grid)
    if len(keys) < len(grid):
        raise HdovdError(f"--grid has a key twice: {' '.join(grid)}; give all its values at once, KEY=A,B,C")
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key in keys or key == SEED:
            raise HdovdError(f"--set {setting}: {'--seeds' if key == SEED else '--grid'} says what {key} is")
    base = [*preset, *settings]
    known = recipe_settings(load_recipe(recipe, base))
    short, cells, seen = short_names(keys, known), list[Cell](), dict[str, Cell]()
    for combination in itertools.product(*keys.values()):
        mine = tuple(f"{key}={value}" for key, value in zip(keys, combination, strict=True))
        try:
            made = load_recipe(recipe, [*base, *mine])
        except HdovdError as error:
            raise HdovdError(f"--grid {' '.join(mine)}: {error}") from error
        tree = made.model_dump(by_alias=True)
        values = {key: value_at(tree, key) for key in keys}
        name = "_".join(f"{short[key]}-{_as_name(in_full(value))}" for key, value in values.items()) or "recipe"
        cell = Cell(name, values, mine)
        same = seen.setdefault(made.to_toml(), cell)
        if same is not cell:
            raise HdovdError(f"--grid: {' '.join(mine)} and {' '.join(same.settings)} are the same cell: leave one out")
        cells.append(cell)
    if len({cell.name for cell in cells}) < len(cells):  # 1 and "1", where a recipe takes both
        raise HdovdError(
            f"--grid {' '.join(grid)}: two cells have the same name: {', '.join(cell.name for cell in cells)}"
        )
    return cells


def _key_and_values(item: str) -> tuple[str, list[str]]:
    key, equals, text = item.partition("=")
    key, values = key.strip(), [value.strip() for value in _split(text)]
    if not equals or not key or not all(values):
        raise HdovdError(f"--grid takes KEY=VALUE,VALUE,..., such as loss.image.enabled=true,false; got {item!r}")
    if key == SEED:
        raise HdovdError(f"--grid {item}: seeds are no cells; give --seeds N")
    return key, values


def _split(text: str) -> list[str]:
    """At commas, but not at those within brackets or quotes."""
    parts = [""]
    for piece in text.split(","):
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", parts[-1])
        if re.search("[\"']", bare) or sum(map(bare.count, OPEN)) > sum(map(bare.count, CLOSE)):  # one is not closed
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts[1:]


def _as_name(text: str) -> str:
    """A value in a folder's name, of a path its end; with a few letters of its hash where not all of it can stand
    there.
    """
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text.rstrip("/").rpartition("/")[2])[-LONGEST:].strip("-.")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")
