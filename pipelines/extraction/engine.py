"""One process's hands on an extraction: it can do any units of the work, parts of levels, in any order.

Units are the same whoever does them: a part's crops go through the model in row order, in batches of one fixed shape
(the last one filled up with zeros), so that its bytes depend neither on the number of workers nor on what was done
before.

How the units of an extraction are shared out: one process, torchrun's, or a SLURM array's `--shard I/N`.

There is one way through all of them: every process goes over its own share of the same list, leaves out what is done,
and claims what it does. Shares may change between runs, and may overlap: the bytes are the same.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hdovd.cache.catalog import Catalog
from hdovd.cache.picture_files import LATER, known_files, write_files
from hdovd.cache.product import Product
from hdovd.cache.rows import Rows, open_rows
from hdovd.cache.schema import Level
from hdovd.cache.writer import ProductWriter
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Split
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import shown
from hdovd.pipelines.embedding.crops import Cutter
from hdovd.pipelines.embedding.embedders import Crops, Embedder
from hdovd.pipelines.embedding.feed import PartRows, RowBatch, Wanted, embed, own_threads
from hdovd.pipelines.extraction.boxes import BoxTable
from hdovd.pipelines.extraction.config import LabelRule, Share
from hdovd.pipelines.extraction.picture_hashes import PictureHashes, files_of
from hdovd.pipelines.extraction.plan import LevelPlan
from hdovd.pipelines.extraction.pseudo_labels import Labels, label_rows
from hdovd.pipelines.extraction.text import TextRows
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.teachers.base import Teacher

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


@dataclass(frozen=True, slots=True)
class Probe:
    """What the rows of a level cost, measured on a few, and GPU memory in use."""

    costs: dict[Level, Cost]
    gpu_bytes: int | None


class Extraction:
    """The inputs of an extraction, its plan, and the products that it fills."""

    def __init__(
        self,
        split: Split,
        table: BoxTable,
        pictures: PictureHashes,
        nouns: Nouns | None,
        classes: TextRows,
        teacher: Teacher,
        embedders: Mapping[Level, Embedder],
        plans: list[LevelPlan],
        *,
        templates: tuple[str, ...],
        batch_size: int | None,
        workers: int,
        origin: dict[str, Any] | None = None,
    ) -> None:
        """`origin`: what a set's record says of the proposals."""
        self.origin = origin or {}
        self.split, self.table, self.pictures, self.nouns, self.teacher = split, table, pictures, nouns, teacher
        self.embedders = embedders
        self._texts = {Level.CLASS: classes} | ({} if nouns is None else {Level.NOUN: TextRows(nouns.vocabulary)})
        self.plans = {plan.level: plan for plan in plans}
        self.templates, self._batch_size, self.workers = templates, batch_size, workers
        self.done: list[Unit] = []  # by this process, pseudo labels too
        self._writers: dict[Level, ProductWriter] = {}
        self._donors: dict[Level, Rows] = {}
        self._sound: set[tuple[Level, int]] = set()  # parts of donors whose checksums were found right
        by_image = None if nouns is None else nouns.by_image
        self._offered = (
            None if by_image is None else {image: np.array(rows, np.int64) for image, rows in by_image.items()}
        )
        self.bar: tqdm[Any] | None = None

    def begin(self, catalog: Catalog) -> None:
        """Begin every product that is not there yet."""
        self._catalog = catalog
        made_with = {**self.teacher.made_with, "batch_size": self._batch_size or self.teacher.best_batch()}
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
                made_with={} if level is Level.BOXES else made_with,
            )
            plan.part_rows = self._writers[
                level
            ].product.part_rows  # another process may have begun it since it was planned
        if self.pictures.later:  # they need not be hashed again
            write_files(self.product(Level.IMAGE), LATER, self.pictures.files[self.pictures.files["size"] >= 0])

    def units(self) -> tuple[list[Unit], list[Unit]]:
        """The texts, which every process needs first, and what can be shared out: a fixed order, done or not."""
        texts = [
            Unit(level, part)
            for level in (Level.CLASS, Level.NOUN)
            if level in self.plans
            for part in range(self.plans[level].parts)
        ]
        pictures = [
            Unit(level, part) for level in (Level.IMAGE, Level.INSTANCE) for part in range(self.plans[level].parts)
        ]
        return texts, pictures

    def do(self, units: Iterable[Unit]) -> list[Unit]:
        """Do units unless they are done; those that another process is at are left out, and returned.

        While a part is written, the next one is computed.
        """
        return self._do(units, wait=False)

    def wait_for(self, unit: Unit) -> None:
        """Do a unit unless it is done; if another process is at it, wait until that ends, or takes too long."""
        self._do([unit], wait=True)  # one unit: who waits for a claim may hold no other

    def _do(self, units: Iterable[Unit], *, wait: bool) -> list[Unit]:
        busy: list[Unit] = []
        writes: deque[Future[None]] = deque()
        asked: deque[tuple[_Part, RowBatch]] = deque()  # what is being embedded
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
                        asked.append((part, batch))
                        yield batch.wanted

            for answer in embed(wanted(), self.embedders, self.teacher.device, self.workers):
                part, batch = asked.popleft()
                assert part.rows is not None
                part.rows.take(batch, answer)
                if self.bar is not None:
                    self.bar.update(len(batch.rows))
                if batch.last:
                    finish(part)
            for write in writes:
                write.result()
        return busy

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
            product, redo = self.product(unit.level), unit.part in self.plans[unit.level].redo
            part = _Part(unit)
            if redo or not product.is_finished(unit.part):
                part.claim = claims.enter_context(ExitStack())
                if not part.claim.enter_context(self._claim(unit.level, unit.part, wait=wait)):
                    busy.append(unit)
                    continue
                if redo:
                    part.rows = self._rows_again(unit)
                    self._undo(unit)
                part.is_mine = not product.is_finished(unit.part)
                if part.is_mine and part.rows is None and unit.level in (Level.IMAGE, Level.INSTANCE):
                    part.rows = self._rows(unit)
            yield part

    def _undo(self, unit: Unit) -> None:
        """Forget a part that is to be made again, what follows from it first: killed at any moment, no record speaks of
        other bytes.
        """
        for level in reversed(self._levels_of(unit)):
            self._catalog.folder.delete(self.product(level).record_name(unit.part))
        self.plans[unit.level].redo = tuple(part for part in self.plans[unit.level].redo if part != unit.part)

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
                files = files_of(part.rows.files, self.pictures.files, self._images_of(part).tolist())
                write_files(self.product(level), number, files)
                self._writers[level].write_part(number, {"embedding": part.rows.embedding}, part.rows.failed)
            elif part.is_mine:
                rows = self._texts[level].embed(self.teacher, self.templates, *self.product(level).rows_of(number))
                self._writers[level].write_part(number, {"embedding": rows})
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
                    self._writers[follows].write_part(number, self._pseudo_labels(*product.rows_of(number)).arrays())
                    self.done.append(Unit(follows, number))

    # --- pictures ---

    def _images_of(self, part: _Part) -> np.ndarray:
        """The numbers of the images that a part has rows of."""
        rows = np.arange(*self.product(part.unit.level).rows_of(part.unit.part))
        return np.unique(self.embedders[part.unit.level].images_of(rows))

    def turned_either_way(self) -> int:
        """Pictures whose annotated size fits them turned and as stored, as far as that is known."""
        known = known_files(self.product(Level.IMAGE))
        return len(np.unique(known["image_id"][known["either"]]))

    def _rows(self, unit: Unit) -> PartRows:
        """The rows of a part, with what another product has of them."""
        plan, (start, stop) = self.plans[unit.level], self.product(unit.level).rows_of(unit.part)
        empty = np.zeros((stop - start, self.teacher.dim), np.float16)
        rows = PartRows(self.embedders[unit.level], start, empty, np.ones(stop - start, bool))
        if plan.reuse is not None and plan.donor is not None:
            reuse = plan.reuse[start:stop]
            rows.missing = reuse < 0
            rows.embedding[~rows.missing] = self._reused(unit.level, plan.donor, reuse[~rows.missing])
        return rows

    def _rows_again(self, unit: Unit) -> PartRows:
        """The rows of a finished part, those of images that could not be read to be embedded again."""
        product, (start, stop) = self.product(unit.level), self.product(unit.level).rows_of(unit.part)
        product.require_sound(unit.part)
        rows = open_rows(product, "embedding", parts={unit.part}).read(start, stop)
        embedder = self.embedders[unit.level]
        image_ids = self.table.image_id[embedder.images_of(np.arange(start, stop))]
        return PartRows(embedder, start, np.array(rows), np.isin(image_ids, [*product.failed()]))

    def _batch_size_of(self, level: Level) -> int:
        """The one that the product was begun with, whatever this process was told."""
        return int(
            self.product(level).attributes["made_with"].get("batch_size")
            or self._batch_size
            or self.teacher.best_batch()
        )

    def _reused(self, level: Level, donor: Product, rows: np.ndarray) -> np.ndarray:
        if level not in self._donors:
            self._donors[level] = open_rows(donor, "embedding", parts=donor.finished())
        for part in np.unique(rows // donor.part_rows).tolist():
            if (level, part) not in self._sound:  # a copy of a damaged row would have a checksum that is right
                donor.require_sound(part)
                self._sound.add((level, part))
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        pieces = [self._donors[level].read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.teacher.dim), np.float16)

    # --- pseudo labels ---

    def _pseudo_labels(self, start: int, stop: int) -> Labels:
        """Of the rows of a part, from what the cache holds of its crops and of the nouns."""
        instances = self.product(Level.INSTANCE)
        embeddings = open_rows(instances, "embedding", parts={start // instances.part_rows}).read(start, stop)
        nouns, rule = self.product(Level.NOUN).table("embedding"), LabelRule.of(self.plans[Level.PSEUDO_LABEL].inputs)
        return label_rows(self.table, start, stop, embeddings, nouns, self._offered, rule)

    # --- measuring ---

    def probe(self) -> Probe:
        """Cut rows of some images spread over the list, and embed a few. Raises HdovdError if none of those images can
        be read.
        """
        count, offset = min(PROBE_IMAGES, len(self.split.images)), self.table.offset
        numbers = np.unique(np.linspace(0, len(self.split.images) - 1, count).astype(np.int64))
        boxes = np.concatenate([np.arange(offset[n], min(offset[n] + PROBE_BOXES, offset[n + 1])) for n in numbers])
        embedder = self.embedders[Level.INSTANCE]
        box = self._cost(Level.INSTANCE, boxes) if len(boxes) else None
        alike = isinstance(embedder, Crops) and embedder.places(1) == 1  # a picture is a crop like any other
        image = box if box is not None and alike else self._cost(Level.IMAGE, numbers)
        return Probe({Level.IMAGE: image, Level.INSTANCE: box or image}, self.teacher.peak_memory_bytes())

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
            size = self._batch_size or self.teacher.best_batch()
            size = size if on_gpu else min(size, PROBE_BATCH_CPU)
            few = embedder.jobs(embedder.groups(rows, size)[0])
            batch, filled = (
                cutter.batch(few, embedder.places(size)),
                sum(job.count for job in few) / embedder.places(size),
            )
            thread.submit(embedder.encode, batch).result()  # the first call prepares what later ones use
            since = time.monotonic()
            thread.submit(embedder.encode, batch).result()
            embed_s = (
                (time.monotonic() - since)
                * filled
                / sum(job.rows for job in few)
                / (1 if on_gpu else torch.get_num_threads())
            )
        return Cost(cut_s, embed_s)


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """What this process does: the part of the work that its command was given, and its rank among torchrun's `world`
    processes.
    """

    command: Share = Share(0, 1)  # noqa: RUF009 - frozen
    rank: int = 0
    world: int = 1
    local_rank: int | None = None

    @property
    def count(self) -> int:
        """How many processes there are for all of the work."""
        return self.command.count * self.world

    @property
    def speaks(self) -> bool:
        """Whether this process prints: one of torchrun's does."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """Under torchrun, one GPU a process."""
        import torch

        own = self.local_rank is not None and asked in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else asked


def this_share(asked: Share | None) -> ProcessShare:
    """`asked` (None: all), shared again among the processes of torchrun if it started this one."""
    command = asked or Share(0, 1)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ProcessShare(command)
    return ProcessShare(command, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def do_share(extraction: Extraction, share: ProcessShare) -> None:
    """Do this process's units, then what the others of the same torchrun have not come to, and wait for what is in
    work.
    """
    texts, units = extraction.units()
    for unit in extraction.do(texts):
        extraction.wait_for(unit)
    asked = units[share.command.index :: share.command.count]
    mine = asked[share.rank :: share.world]
    others = [unit for unit in reversed(asked) if unit not in mine]  # from the end: where the others come last
    label = f"CLIP on {shown(extraction.teacher.device)}" + (f", 1 of {share.world}" if share.world > 1 else "")
    with progress(None, label, "row", total=new_rows(extraction, mine) if share.speaks else 0) as extraction.bar:
        for unit in extraction.do(mine + others):
            extraction.wait_for(unit)


def new_rows(extraction: Extraction, units: list[Unit]) -> int:
    """Rows that `units` have to compute."""
    count = 0
    for plan in extraction.plans.values():
        todo = set(plan.todo) & {unit.part for unit in units if unit.level is plan.level}
        count += plan.new_rows_of(todo)
    return count
