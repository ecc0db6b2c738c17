"""What an extraction has to do: per level hit, extend or extract, and why. Reads the cache, writes nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from hdovd.cache.catalog import Catalog
from hdovd.cache.identity import KeyInputs, differences, key_of
from hdovd.cache.product import Product
from hdovd.cache.schema import (
    CHUNK_ROWS,
    IMAGE_PART_ROWS,
    PART_ROWS,
    ROW_ARRAYS,
    TABLE_ARRAYS,
    TABLES,
    Level,
    row_arrays,
)
from hdovd.core.errors import counted
from hdovd.pipelines.extraction.boxes import BoxTable, match_rows

MATCHED_BY = {
    Level.IMAGE: ("image_id", "image_hash"),
    Level.INSTANCE: ("image_id", "image_hash", "box"),
}  # what makes a row the same row
DATA_INPUTS = (
    "images",
    "boxes",
    "exif",
)  # inputs that may differ between two products whose rows are the same where they match


@dataclass(slots=True)
class LevelPlan:
    """One level of an extraction.

    `decision` is "hit", "extend" or "extract", `reason` why it is no hit. `redo`: finished parts to make again.
    `kept` (rows,) bool: rows whose image could be read, if parts are made again. `donor` and `reuse` (rows,): another
    product that has rows of this one, and which; -1 where it has not.
    """

    level: Level
    inputs: KeyInputs
    rows: int
    dim: int
    part_rows: int
    names: list[str] | None
    decision: str = "extract"
    reason: str = ""
    missing: list[int] | None = None
    redo: tuple[int, ...] = ()
    kept: np.ndarray | None = None
    donor: Product | None = None
    reuse: np.ndarray | None = None

    @property
    def key(self) -> str:
        return key_of(self.inputs)

    @property
    def parts(self) -> int:
        return -(-self.rows // self.part_rows) if ROW_ARRAYS[self.level] else 0

    @property
    def todo(self) -> list[int]:
        """The parts to write."""
        return sorted({*(range(self.parts) if self.missing is None else self.missing), *self.redo})

    @property
    def new_rows(self) -> int:
        """Rows to compute."""
        return self.new_rows_of(self.todo)

    def new_rows_of(self, parts: Iterable[int]) -> int:
        """Rows of some parts, less those that the product itself or another one has."""
        new = np.ones(self.rows, bool) if self.reuse is None else self.reuse < 0
        new = new if self.kept is None else new & ~self.kept
        return sum(int(new[part * self.part_rows : (part + 1) * self.part_rows].sum()) for part in parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the row arrays, or of the tables of a level that has nothing else."""
        arrays = row_arrays(self.level, self.dim)
        if not arrays:
            return (
                sum(np.dtype(dtype).itemsize for dtype in TABLE_ARRAYS[self.level].values()) + 3 * 4
            )  # box is four values
        return sum(np.dtype(dtype).itemsize * (self.dim if wide else 1) for dtype, wide in arrays.values())


def plan_levels(
    catalog: Catalog | None,
    inputs: dict[Level, KeyInputs],
    table: BoxTable,
    dim: int,
    *,
    part_rows: int,
    retry_failed: bool,
    read_alike: Callable[[int], bool] = lambda _: True,
) -> list[LevelPlan]:
    """A plan for every level of `inputs`, against what `catalog` holds; None for no cache yet. `read_alike`: whether
    the picture of this number is the same by all rules of reading.
    """
    plans: list[LevelPlan] = []
    for level in Level:
        if level not in inputs:
            continue
        names = inputs[level].get("names")
        rows = len(table.image_id if level is Level.IMAGE else table.box) if names is None else len(names)
        asked = part_rows_of(level, part_rows)
        if level is Level.PSEUDO_LABEL:  # made part by part with the crops that it names
            asked = next((plan.part_rows for plan in plans if plan.level is Level.INSTANCE), asked)
        wide = dim if "embedding" in ROW_ARRAYS[level] else inputs[level].get("top_k", 0)
        plan = LevelPlan(level, inputs[level], rows, wide, asked, names)
        if catalog is None:
            plan.reason = "no cache yet"
        else:
            _compare(catalog, plan, table, read_alike, retry_failed=retry_failed)
        plans.append(plan)
    return plans


def part_rows_of(level: Level, part_rows: int) -> int:
    """The image level has a row where others have a picture's worth of boxes, so its parts are smaller; of whole
    chunks, too.
    """
    if level is not Level.IMAGE:
        return part_rows
    rows = max(1, part_rows * IMAGE_PART_ROWS // PART_ROWS)
    return rows if rows <= CHUNK_ROWS else rows - rows % CHUNK_ROWS


def _compare(
    catalog: Catalog, plan: LevelPlan, table: BoxTable, read_alike: Callable[[int], bool], *, retry_failed: bool
) -> None:
    product = catalog.find(plan.level, plan.key)
    if product is not None:
        plan.part_rows, plan.missing = product.part_rows, product.missing()
        plan.redo = tuple(product.failed_parts()) if retry_failed else ()
        plan.kept = _usable(product)[:-1] if plan.redo else None
        again = f"tries again what could not be read: {counted(len(product.failed()), 'image')}" if plan.redo else ""
        if product.whole:
            plan.decision, plan.reason = "extract" if plan.redo else "hit", again
            return
        _find_donor(catalog, plan, table, read_alike)
        done = product.parts - len(plan.missing)
        plan.decision = "extend" if done or plan.donor else "extract"
        plan.reason = f"goes on: {done} of {product.parts} parts are done" + (f"; {again}" if again else "")
        return
    nearest, lines = catalog.nearest(plan.level, plan.inputs)
    plan.reason = f"no {plan.level} product yet" if nearest is None else "; ".join(lines)
    _find_donor(catalog, plan, table, read_alike)
    if plan.donor is not None:
        plan.decision = "extend"


def _find_donor(catalog: Catalog, plan: LevelPlan, table: BoxTable, read_alike: Callable[[int], bool]) -> None:
    """The product of the same CLIP and recipe that has most of the rows wanted."""
    if plan.level not in MATCHED_BY:
        return
    wanted = [_per_row(name, plan.level, getattr(table, name), table.offset) for name in MATCHED_BY[plan.level]]
    fixed = {name: value for name, value in plan.inputs.items() if name not in DATA_INPUTS}
    for product in catalog.products(plan.level):
        theirs = {name: value for name, value in product.attributes["key_inputs"].items() if name not in DATA_INPUTS}
        if product.key == plan.key or differences(fixed, theirs) or not product.is_finished(TABLES):
            continue
        offset = product.table("offset") if product.level is Level.INSTANCE else table.offset
        reuse = match_rows(
            wanted, [_per_row(name, product.level, product.table(name), offset) for name in MATCHED_BY[product.level]]
        )
        reuse[~_usable(product)[reuse] & (reuse >= 0)] = -1
        if product.attributes["key_inputs"].get("exif") != plan.inputs["exif"]:
            alike = np.array([read_alike(n) for n in range(len(table.image_id))], bool)
            reuse[~_per_row("", plan.level, alike, table.offset)] = -1
        if (reuse >= 0).sum() > (0 if plan.reuse is None else (plan.reuse >= 0).sum()):
            plan.donor, plan.reuse = product, reuse


def _per_row(name: str, level: Level, values: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """A table with an entry a row of the level: what an image has stands once for each of its boxes."""
    return values if level is Level.IMAGE or name == "box" else np.repeat(values, np.diff(offset))


def _usable(product: Product) -> np.ndarray:
    """(rows + 1,) bool: rows of finished parts whose image could be read; the last, for no row at all, is False."""
    usable = np.zeros(product.rows + 1, bool)
    for part in product.finished():
        start, stop = product.rows_of(part)
        usable[start:stop] = True
    failed = list(product.failed())
    if failed:
        image_id = product.table("image_id")
        per_row = image_id if product.level is Level.IMAGE else np.repeat(image_id, np.diff(product.table("offset")))
        usable[:-1] &= ~np.isin(per_row, failed)
    return usable
