"""What an extraction has to do, per level hit, extend or extract, and why; and the work of one process on it: any
units, parts of levels, in any order.

Units are the same whoever does them: a part's crops go through the model in row order, in batches of one fixed shape
(the last one filled up with zeros), so that its bytes depend neither on the number of workers nor on what was done
before.

The units are shared out over one process, torchrun's, or a SLURM array's `--shard I/N`. There is one way through all of
them: every process goes over its own share of the same list, leaves out what is done, and claims what it does. Shares
may change between runs, and may overlap: the bytes are the same.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hdovd.cache import (
    CHUNK_ROWS,
    IMAGE_PART_ROWS,
    PART_ROWS,
    TABLE_ARRAYS,
    TABLES,
    Catalog,
    KeyInputs,
    Level,
    Product,
    differences,
    key_of,
    row_arrays,
)
from hdovd.cache.picture_files import LATER, write_files
from hdovd.cache.rows import Rows
from hdovd.cache.schema import ROW_ARRAYS
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError, counted
from hdovd.data import Split
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import shown, workers_for
from hdovd.pipelines.embedding.embedders import Cutter, Embedder, PartRows, Wanted, embed, own_threads
from hdovd.pipelines.extraction.config import TEMPERATURE, ExtractConfig, LabelRule, Share
from hdovd.pipelines.extraction.identities import BoxTable, PictureHashes, TextRows, files_of, match_rows
from hdovd.pipelines.extraction.pseudo_labels import Verdicts, barred_in, label_rows
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.teachers.base import Teacher

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
    `donor` and `reuse` (rows,): a product that has rows of this one, and which; -1 where it has not. If parts are made
    again, it is the product itself.
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
        """Rows of some parts, less those that the donor has."""
        new = np.ones(self.rows, bool) if self.reuse is None else self.reuse < 0
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
    for level in sorted(inputs, key=list(Level).index):
        names = inputs[level].get("names")
        rows = len(table.image_id if level is Level.IMAGE else table.box) if names is None else len(names)
        asked = part_rows
        if level is Level.IMAGE:  # a row where others have a picture's worth of boxes: smaller parts, of whole chunks
            asked = max(1, part_rows * IMAGE_PART_ROWS // PART_ROWS)
            asked -= asked % CHUNK_ROWS if asked > CHUNK_ROWS else 0
        dim_of_row = dim if "embedding" in ROW_ARRAYS[level] else inputs[level].get("top_k", 0)
        plan = LevelPlan(level, inputs[level], rows, dim_of_row, asked, names)
        if catalog is None:
            plan.reason = "no cache yet"
        else:
            _compare(catalog, plan, table, read_alike, retry_failed=retry_failed)
        plans.append(plan)
    return plans


def _compare(
    catalog: Catalog, plan: LevelPlan, table: BoxTable, read_alike: Callable[[int], bool], *, retry_failed: bool
) -> None:
    product = catalog.find(plan.level, plan.key)
    if product is not None:
        plan.part_rows, plan.missing = product.part_rows, product.missing()
        plan.redo = tuple(product.failed_parts()) if retry_failed else ()
        again = ""
        if plan.redo:
            again = f"tries again what could not be read: {counted(len(product.failed()), 'image')}"
        if plan.redo and product.whole:
            plan.donor, plan.reuse = product, np.where(_usable(product)[:-1], np.arange(product.rows), -1)
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
        usable[slice(*product.rows_of(part))] = True
    if failed := list(product.failed()):
        image_id = product.table("image_id")
        per_row = image_id if product.level is Level.IMAGE else np.repeat(image_id, np.diff(product.table("offset")))
        usable[:-1] &= ~np.isin(per_row, failed)
    return usable


PROBE_IMAGES = 16
PROBE_BOXES = 64  # an image
PROBE_BATCH_CPU = 32
WRITES_BEHIND = 1  # parts that wait in memory to be written while the next is computed


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a level."""

    level: Level
    part: int


@dataclass(slots=True)
class _Part:
    """A unit in work. `claim`: what to let go of when it is written; `rows`: None if it is whole, or of texts."""

    unit: Unit
    claim: ExitStack = field(default_factory=ExitStack)
    is_mine: bool = False
    rows: PartRows | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a row takes to be cut out by one core, and to be embedded by all."""

    cut_s: float
    embed_s: float

    def seconds(self, rows: int, workers: int) -> float:
        """Expected for `rows`: with worker processes the slower of the two counts, without them both do."""
        return rows * (
            max(self.cut_s / workers, self.embed_s) if workers else self.cut_s / torch.get_num_threads() + self.embed_s
        )


class Extraction:
    """The inputs of an extraction, its plan, and the products that it fills."""

    def __init__(
        self,
        config: ExtractConfig,
        split: Split,
        table: BoxTable,
        pictures: PictureHashes,
        nouns: Nouns | None,
        classes: TextRows,
        base_names: Sequence[Sequence[str]],
        teacher: Teacher,
        embedders: Mapping[Level, Embedder],
        plans: list[LevelPlan],
        origin: dict[str, Any],
        verdicts: Verdicts | None = None,
    ) -> None:
        """`base_names`: all names of each base class. `origin`: what a set's record says of the proposals."""
        self.split, self.table, self.pictures, self.teacher = split, table, pictures, teacher
        self.embedders, self.templates, self.origin, self.verdicts = embedders, config.templates, origin, verdicts
        self._texts = {Level.CLASS: classes} | ({} if nouns is None else {Level.NOUN: TextRows(nouns.vocabulary)})
        self.plans = {plan.level: plan for plan in plans}
        self._asked_batch = config.batch_size
        self.workers = workers_for(teacher.device, config.workers)
        self.done: list[Unit] = []  # by this process, pseudo labels too
        self._writers: dict[Level, ProductWriter] = {}
        self._donors: dict[Level, Rows] = {}
        self.offered, self.base_names = None if nouns is None else nouns.by_image, base_names
        self.barred = None if nouns is None else barred_in(config.labels, nouns, split.images, base_names)
        self.bar: tqdm[Any] | None = None

    @cached_property
    def _batch_size(self) -> int:
        """Searched for where none was asked for, and only where something is embedded."""
        return self._asked_batch or self.teacher.best_batch()

    def begin(self, catalog: Catalog) -> None:
        """Begin every product that is not there yet."""
        self._catalog = catalog
        for level, plan in self.plans.items():
            if level is Level.PSEUDO_LABEL:  # made part by part with the crops that it names
                plan.part_rows = self.plans[Level.INSTANCE].part_rows
            self._writers[level] = ProductWriter.begin(
                catalog.folder,
                level,
                plan.inputs,
                rows=plan.rows,
                part_rows=plan.part_rows,
                dim=plan.dim,
                tables=self.table.tables(level),
                names=plan.names,
                made_with={} if level is Level.BOXES else {**self.teacher.made_with, "batch_size": self._batch_size},
            )
            plan.part_rows = self.product(level).part_rows  # another process may have begun it since it was planned
        if self.pictures.later:  # they need not be hashed again
            write_files(self.product(Level.IMAGE), LATER, self.pictures.files[self.pictures.files["size"] >= 0])

    def units(self) -> tuple[list[Unit], list[Unit]]:
        """The texts, which every process needs first, and what can be shared out: a fixed order, done or not."""
        texts, pictures = (
            [Unit(level, part) for level in levels if level in self.plans for part in range(self.plans[level].parts)]
            for levels in ((Level.CLASS, Level.NOUN), (Level.IMAGE, Level.INSTANCE))
        )
        return texts, pictures

    def do(self, units: Iterable[Unit], *, wait: bool = False) -> list[Unit]:
        """Do units unless they are done; those that another process is at are left out, and returned. `wait`: until
        that ends, or takes too long; for one unit, since who waits for a claim may hold no other.

        While a part is written, the next one is computed.
        """
        busy: list[Unit] = []
        writes: deque[Future[None]] = deque()
        asked: deque[tuple[PartRows, _Part, Wanted]] = deque()  # what is being embedded
        with ExitStack() as claims, ThreadPoolExecutor(1) as writer:

            def finish(part: _Part) -> None:
                writes.append(writer.submit(self._finish, part, busy, wait))
                while len(writes) > WRITES_BEHIND:
                    writes.popleft().result()

            def wanted() -> Iterator[Wanted]:
                for part in self._claimed(units, busy, claims, wait):
                    if part.rows is None or not part.rows.missing.any():
                        finish(part)
                        continue
                    for batch in part.rows.batches(self._batch_size_of(part.unit.level)):
                        asked.append((part.rows, part, batch))
                        yield batch

            for answer in embed(wanted(), self.embedders, self.teacher.device, self.workers):
                rows, part, batch = asked.popleft()
                rows.take(batch, answer)
                if self.bar is not None:
                    self.bar.update(len(batch.rows))
                if batch.last:
                    finish(part)
            for write in writes:
                write.result()
        return busy

    def do_all(self, units: Iterable[Unit]) -> None:
        """Do units, and wait for those that other processes are at."""
        for unit in self.do(units):
            self.do([unit], wait=True)

    def left(self) -> list[Unit]:
        """What is not done, in the order of `units`."""
        todo = {level: {*self.product(level).missing(), *plan.redo} for level, plan in self.plans.items()}
        return [
            unit
            for units in self.units()
            for unit in units
            if any(unit.part in todo[level] for level in self._levels_of(unit))
        ]

    def _levels_of(self, unit: Unit) -> list[Level]:
        """A unit's own level and what follows from it."""
        return [unit.level] + [Level.PSEUDO_LABEL] * (unit.level is Level.INSTANCE and Level.PSEUDO_LABEL in self.plans)

    def _claim(self, level: Level, part: int, *, wait: bool) -> AbstractContextManager[bool]:
        return self._catalog.folder.claim(f"{self.product(level).prefix}/{part}", wait=wait)

    def _claimed(self, units: Iterable[Unit], busy: list[Unit], claims: ExitStack, wait: bool) -> Iterator[_Part]:
        """Units of which something is to be done, claimed; those that another process is at go to `busy`."""
        for unit in units:
            product, plan, part = self.product(unit.level), self.plans[unit.level], _Part(unit)
            redo = unit.part in plan.redo
            if redo or not product.is_finished(unit.part):
                part.claim = claims.enter_context(ExitStack())
                if not part.claim.enter_context(self._claim(unit.level, unit.part, wait=wait)):
                    busy.append(unit)
                    continue
                rows = self._rows(unit) if unit.level in MATCHED_BY else None
                if redo:  # what follows from it first: killed at any moment, no record speaks of other bytes
                    for level in reversed(self._levels_of(unit)):
                        self._catalog.folder.delete(self.product(level).record_name(unit.part))
                    plan.redo = tuple(other for other in plan.redo if other != unit.part)
                part.is_mine = not product.is_finished(unit.part)
                part.rows = rows if part.is_mine else None
            yield part

    def product(self, level: Level) -> Product:
        return self._writers[level].product

    @property
    def whole(self) -> bool:
        return all(writer.product.whole for writer in self._writers.values())

    def _finish(self, part: _Part, busy: list[Unit], wait: bool) -> None:
        """Write a part, let go of it, and write what follows from it."""
        level, number = part.unit.level, part.unit.part
        with part.claim:
            if part.rows is not None:
                rows = np.arange(*self.product(level).rows_of(number))
                images = np.unique(self.embedders[level].images_of(rows)).tolist()
                write_files(self.product(level), number, files_of(part.rows.files, self.pictures.files, images))
                self._writers[level].write_part(number, {"embedding": part.rows.embedding}, part.rows.failed)
            elif part.is_mine:
                texts = self._texts[level].embed(self.teacher, self.templates, *self.product(level).rows_of(number))
                self._writers[level].write_part(number, {"embedding": texts})
            if part.is_mine:
                self.done.append(part.unit)
        for follows in self._levels_of(part.unit)[1:]:
            product = self.product(follows)
            if product.is_finished(number):
                continue
            with self._claim(follows, number, wait=wait) as mine:
                if not mine:
                    busy.append(part.unit)
                elif not product.is_finished(number):
                    self._writers[follows].write_part(number, self._pseudo_labels(*product.rows_of(number)))
                    self.done.append(Unit(follows, number))

    def _rows(self, unit: Unit) -> PartRows:
        """The rows of a part, with what the donor has of them, whose checksums are compared: a copy of a damaged row
        would have one that is right.
        """
        plan, (start, stop) = self.plans[unit.level], self.product(unit.level).rows_of(unit.part)
        empty = np.zeros((stop - start, self.teacher.dim), np.float16)
        rows = PartRows(self.embedders[unit.level], start, empty, np.ones(stop - start, bool))
        if plan.reuse is not None and plan.donor is not None:
            reuse, donor = plan.reuse[start:stop], self._donors.get(unit.level)
            if plan.donor.key == plan.key:  # made again: part by part, since others do so too
                parts = {unit.part} & plan.donor.finished()
                reuse = reuse if parts else np.full_like(reuse, -1)
                donor = Rows(plan.donor, "embedding", parts=parts, checked=True)
            elif donor is None:
                donor = Rows(plan.donor, "embedding", parts=plan.donor.finished(), checked=True)
                self._donors[unit.level] = donor
            rows.missing, there = reuse < 0, reuse[reuse >= 0]
            runs = np.split(there, np.flatnonzero(np.diff(there) != 1) + 1) if len(there) else []
            pieces = [donor.read(int(run[0]), int(run[-1]) + 1) for run in runs]
            rows.embedding[~rows.missing] = np.concatenate([empty[:0], *pieces])
        return rows

    def _batch_size_of(self, level: Level) -> int:
        """The one that the product was begun with, whatever this process was told."""
        return int(self.product(level).attributes["made_with"].get("batch_size") or self._batch_size)

    def _pseudo_labels(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Of the rows of a part, from what the cache holds of its crops and of the nouns."""
        instances = self.product(Level.INSTANCE)
        embeddings = Rows(instances, "embedding", parts={start // instances.part_rows}).read(start, stop)
        nouns, inputs = self.product(Level.NOUN).table("embedding"), self.plans[Level.PSEUDO_LABEL].inputs
        return label_rows(
            self.table,
            start,
            stop,
            embeddings,
            nouns,
            self.offered,
            LabelRule.of(inputs),
            self.verdicts,
            inputs.get("verdicts", {}).get("temperature", TEMPERATURE),
            self.barred,
        )

    def probe(self) -> dict[Level, Cost]:
        """What the rows of a level cost: rows of some images spread over the list are cut, and a few embedded. Raises
        HdovdError if none of those images can be read.
        """
        count, offset = min(PROBE_IMAGES, len(self.split.images)), self.table.offset
        numbers = np.unique(np.linspace(0, len(self.split.images) - 1, count).astype(np.int64))
        boxes = np.concatenate([np.arange(offset[n], min(offset[n] + PROBE_BOXES, offset[n + 1])) for n in numbers])
        images = self._cost(Level.IMAGE, numbers)
        return {Level.IMAGE: images, Level.INSTANCE: self._cost(Level.INSTANCE, boxes) if len(boxes) else images}

    def _cost(self, level: Level, rows: np.ndarray) -> Cost:
        embedder, on_gpu = self.embedders[level], self.teacher.device.type == "cuda"
        jobs, cutter = embedder.jobs(rows), Cutter(embedder.fit, embedder.input_size)
        with own_threads(1) as thread:
            since = time.monotonic()
            batch = thread.submit(cutter.batch, jobs, sum(job.count for job in jobs)).result()
            cut_s = (time.monotonic() - since) / len(rows)
            if len(batch.problems) == len(jobs):
                raise HdovdError(
                    f"none of {len(jobs)} pictures of {self.split.folder} can be read, spread over "
                    f"{len(self.split.images)}; the first: {next(iter(batch.problems.values()))}"
                )
            size = self._batch_size if on_gpu else min(self._batch_size, PROBE_BATCH_CPU)
            few, places = embedder.jobs(embedder.groups(rows, size)[0]), embedder.places(size)
            batch = cutter.batch(few, places)
            thread.submit(embedder.encode, batch).result()  # the first call prepares what later ones use
            since = time.monotonic()
            thread.submit(embedder.encode, batch).result()
            of_rows = (time.monotonic() - since) * sum(job.count for job in few) / places
        return Cost(cut_s, of_rows / sum(job.rows for job in few) / (1 if on_gpu else torch.get_num_threads()))


def do_share(extraction: Extraction, share: Share) -> None:
    """Do this process's units, then what the others of the same torchrun have not come to, and wait for what is in
    work.
    """
    texts, units = extraction.units()
    extraction.do_all(texts)
    asked = units[share.index :: share.count]
    mine = asked[share.rank :: share.world]
    others = [unit for unit in reversed(asked) if unit not in mine]  # from the end: where the others come last
    label = f"CLIP on {shown(extraction.teacher.device)}" + (f", 1 of {share.world}" if share.world > 1 else "")
    with progress(None, label, "row", total=new_rows(extraction, mine) if share.speaks else 0) as extraction.bar:
        extraction.do_all(mine + others)


def new_rows(extraction: Extraction, units: list[Unit]) -> int:
    """Rows that `units` have to compute."""
    return sum(
        plan.new_rows_of(set(plan.todo) & {unit.part for unit in units if unit.level is level})
        for level, plan in extraction.plans.items()
    )
