"""One process's hands on an extraction: it can do any unit of the work, a part of a level, in any order.

Units are the same whoever does them: a part's crops go through the model in row order, in batches of one fixed shape
(the last one filled up with zeros), so that its bytes depend neither on the number of workers nor on what was done before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hdovd.cache.catalog import Catalog
from hdovd.cache.product import Product
from hdovd.cache.rows import Rows, open_rows
from hdovd.cache.schema import Level, Source
from hdovd.cache.writer import ProductWriter
from hdovd.coco import Split
from hdovd.errors import HdovdError
from hdovd.pipelines.box_table import BoxTable
from hdovd.pipelines.crops import CropDataset, CropJob
from hdovd.pipelines.extract_plan import LevelPlan
from hdovd.pipelines.nouns import Nouns
from hdovd.pipelines.teacher import Teacher
from hdovd.pipelines.text_rows import TextRows

PROBE_IMAGES = 16
PROBE_BATCH_CPU = 32
SIMILARITY_ROWS = 4_096  # crops compared with nouns at a time


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a level."""

    level: Level
    part: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Seconds that a row takes to be cut out and to be embedded, measured on a few, and GPU memory in use."""

    crop_s: float
    embed_s: float
    gpu_bytes: int | None

    def seconds(self, rows: int, workers: int) -> float:
        """Expected for `rows`: with worker processes the slower of the two counts, without them both do."""
        return rows * (max(self.crop_s / workers, self.embed_s) if workers else self.crop_s + self.embed_s)


class Extraction:
    """The inputs of an extraction, its plan, and the products that it fills."""

    def __init__(self, split: Split, table: BoxTable, nouns: Nouns | None, classes: TextRows, teacher: Teacher, plans: list[LevelPlan], *,
                 templates: tuple[str, ...], batch_size: int, workers: int) -> None:
        self.split, self.table, self.nouns, self.teacher = split, table, nouns, teacher
        self._texts = {Level.CLASS: classes} | ({} if nouns is None else {Level.NOUN: TextRows(nouns.vocabulary)})
        self.plans = {plan.level: plan for plan in plans}
        self._templates, self._batch_size, self._workers = templates, batch_size, workers
        self.done: list[Unit] = []  # by this process, pseudo labels too
        self._writers: dict[Level, ProductWriter] = {}
        self._donors: dict[Level, Rows] = {}
        self._sound: set[tuple[Level, int]] = set()  # parts of donors whose checksums were found right
        self._offered = {} if nouns is None or nouns.by_image is None else {i: np.array(nouns.offered(i), np.int64) for i in nouns.by_image}
        self.bar: tqdm[Any] | None = None

    def begin(self, catalog: Catalog) -> None:
        """Begin every product that is not there yet."""
        self._catalog = catalog
        for level, plan in self.plans.items():
            if level is Level.PSEUDO_LABEL:  # made part by part with the crops that it names
                plan.part_rows = self.plans[Level.INSTANCE].part_rows
            made_with = {**self.teacher.made_with, "batch_size": self._batch_size}
            self._writers[level] = ProductWriter.begin(
                catalog.folder, level, plan.inputs, rows=plan.rows, part_rows=plan.part_rows, dim=plan.dim,
                tables=self.table.tables(level), names=plan.names, made_with={} if level is Level.BOXES else made_with)
            plan.part_rows = self._writers[level].product.part_rows  # another process may have begun it since it was planned

    def units(self) -> tuple[list[Unit], list[Unit]]:
        """The texts, which every process needs first, and what can be shared out: a fixed order, done or not."""
        texts = [Unit(level, part) for level in (Level.CLASS, Level.NOUN) if level in self.plans for part in range(self.plans[level].parts)]
        pictures = [Unit(level, part) for level in (Level.IMAGE, Level.INSTANCE) for part in range(self.plans[level].parts)]
        return texts, pictures

    def do(self, unit: Unit, *, wait: bool = True) -> bool:
        """Do a unit unless it is done. False, at once, if another process is at it and we shall not `wait`."""
        for level in self._levels_of(unit):
            product = self.product(level)
            if product.is_finished(unit.part) and unit.part not in self.plans[level].redo:
                continue
            with self._catalog.folder.claim(f"{product.prefix}/{unit.part}", wait=wait) as mine:
                if not mine:
                    return False
                if unit.part in self.plans[level].redo:
                    self._undo(unit)
                if not product.is_finished(unit.part):
                    self._write(Unit(level, unit.part))
                    self.done.append(Unit(level, unit.part))
        return True

    def left(self) -> list[Unit]:
        """What is not done, in the order of `units`."""
        todo = {level: {*self.product(level).missing(), *plan.redo} for level, plan in self.plans.items()}
        return [unit for units in self.units() for unit in units if any(unit.part in todo[level] for level in self._levels_of(unit))]

    def _levels_of(self, unit: Unit) -> list[Level]:
        """A unit's own level and what follows from it."""
        return [unit.level] + [Level.PSEUDO_LABEL] * (unit.level is Level.INSTANCE and Level.PSEUDO_LABEL in self.plans)

    def _undo(self, unit: Unit) -> None:
        """Forget a part that is to be made again, what follows from it first: killed at any moment, no record speaks of other bytes."""
        for level in reversed(self._levels_of(unit)):
            self._catalog.folder.delete(self.product(level).record_name(unit.part))
        self.plans[unit.level].redo = tuple(part for part in self.plans[unit.level].redo if part != unit.part)

    def product(self, level: Level) -> Product:
        return self._writers[level].product

    @property
    def whole(self) -> bool:
        return all(writer.product.whole for writer in self._writers.values())

    def _write(self, unit: Unit) -> None:
        writer = self._writers[unit.level]
        start, stop = writer.product.rows_of(unit.part)
        if unit.level in self._texts:
            writer.write_part(unit.part, {"embedding": self._texts[unit.level].embed(self.teacher, self._templates, start, stop)})
        elif unit.level is Level.PSEUDO_LABEL:
            noun, cosine = self._pseudo_labels(start, stop)
            writer.write_part(unit.part, {"noun": noun, "noun_cosine": cosine})
        else:
            embeddings, failed = self._embed(unit.level, start, stop)
            writer.write_part(unit.part, {"embedding": embeddings}, failed)

    # --- pictures ---

    def _embed(self, level: Level, start: int, stop: int) -> tuple[np.ndarray, dict[int, str]]:
        """Rows `start` to `stop` of the image or instance level (n, D) float16, and why images have none."""
        out = np.zeros((stop - start, self.teacher.dim), np.float16)
        todo = np.ones(stop - start, bool)
        plan = self.plans[level]
        if plan.reuse is not None and plan.donor is not None:
            reuse = plan.reuse[start:stop]
            todo = reuse < 0
            out[~todo] = self._reused(level, plan.donor, reuse[~todo])
        jobs, places = self._jobs(level, start, todo)
        failed: dict[int, str] = {}
        batches = self._batches(jobs, places, failed)
        size = self._writers[level].product.attributes["made_with"].get("batch_size", self._batch_size)
        for rows, pixels in _fixed_size(batches, size):
            out[rows] = self._embed_batch(pixels, size)
            if self.bar is not None:
                self.bar.update(len(rows))
        return out, failed

    def _jobs(self, level: Level, start: int, todo: np.ndarray) -> tuple[list[CropJob], list[np.ndarray]]:
        """What to read and cut for the rows in `todo`, counted from `start`, image by image, and the rows of each job."""
        table, jobs, places = self.table, [], []
        images = range(start, start + len(todo)) if level is Level.IMAGE else table.images_of(start, start + len(todo))
        for number in images:
            image = self.split.images[number]
            if level is Level.IMAGE:
                rows, boxes = np.array([number - start]), None
                rows = rows[todo[rows]]
            else:
                first, last = max(int(table.offset[number]), start), min(int(table.offset[number + 1]), start + len(todo))
                rows = np.arange(first - start, last - start)
                rows = rows[todo[rows]]
                boxes = table.box[rows + start]
            if len(rows):
                jobs.append(CropJob(image.id, self.split.path(image), image.width, image.height, boxes))
                places.append(rows)
        return jobs, places

    def _batches(self, jobs: list[CropJob], places: list[np.ndarray], failed: dict[int, str]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Rows and pixels, image by image, in order; images that cannot be read go to `failed`."""
        for number, pixels, problem in DataLoader(CropDataset(jobs, self.teacher.preprocess), batch_size=None, num_workers=self._workers):
            if problem:
                failed[jobs[number].image_id] = problem
                if self.bar is not None:
                    self.bar.update(len(places[number]))
            else:
                yield places[number], pixels

    def _embed_batch(self, pixels: Tensor, size: int) -> np.ndarray:
        if len(pixels) == size:
            return self.teacher.embed_images(pixels)
        filled = torch.cat([pixels, pixels.new_zeros(size - len(pixels), *pixels.shape[1:])])
        return self.teacher.embed_images(filled)[: len(pixels)]

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

    def _pseudo_labels(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The noun that each proposal is most like among those that its image offers, and the cosine; -1 and 0 for other rows."""
        noun, cosine = np.full(stop - start, -1, np.int32), np.zeros(stop - start, np.float32)
        instances = self.product(Level.INSTANCE)
        embeddings = open_rows(instances, "embedding", parts={start // instances.part_rows}).read(start, stop)
        nouns = torch.from_numpy(self.product(Level.NOUN).table("embedding").astype(np.float32))
        named = (self.table.source[start:stop] == Source.PROPOSAL) & embeddings.any(axis=1)
        for number in self.table.images_of(start, stop) if self._offered else ():
            first, last = max(int(self.table.offset[number]), start) - start, min(int(self.table.offset[number + 1]), stop) - start
            rows = first + np.flatnonzero(named[first:last])
            offered = self._offered.get(int(self.table.image_id[number]))
            if offered is not None and len(offered) and len(rows):
                best = (torch.from_numpy(embeddings[rows].astype(np.float32)) @ nouns[offered].T).max(dim=1)
                noun[rows], cosine[rows] = offered[best.indices.numpy()], best.values.numpy()
        if self.nouns is not None and self.nouns.by_image is None:
            for rows in np.array_split(np.flatnonzero(named), max(1, -(-int(named.sum()) // SIMILARITY_ROWS))):
                best = (torch.from_numpy(embeddings[rows].astype(np.float32)) @ nouns.T).max(dim=1)
                noun[rows], cosine[rows] = best.indices.numpy(), best.values.numpy()
        return noun, cosine

    # --- measuring ---

    def probe(self) -> Probe:
        """Cut and embed a few crops of images spread over the list. Raises HdovdError if none of those can be read."""
        count = min(PROBE_IMAGES, len(self.split.images))
        numbers = sorted({int(n) for n in np.linspace(0, len(self.split.images) - 1, count)})
        jobs = []
        for number in numbers:
            image = self.split.images[number]
            boxes = self.table.box[self.table.offset[number] : self.table.offset[number] + 4]
            jobs.append(CropJob(image.id, self.split.path(image), image.width, image.height, boxes))
        since, data = time.monotonic(), CropDataset(jobs, self.teacher.preprocess)
        read = [data[number] for number in range(len(jobs))]
        pixels = [pixels for _, pixels, problem in read if not problem]
        if not pixels:
            raise HdovdError(f"none of {len(jobs)} pictures of {self.split.folder} can be read, spread over {len(self.split.images)}; "
                             f"the first: {read[0][2]}")
        crops = torch.cat(pixels)
        crop_s = (time.monotonic() - since) / len(crops)
        gpu = self.teacher.peak_memory_bytes() is not None
        size = self._batch_size if gpu else min(self._batch_size, PROBE_BATCH_CPU)
        crops = crops.repeat(-(-size // len(crops)), 1, 1, 1)[:size]
        self.teacher.embed_images(crops)  # the first call prepares what later ones use
        since = time.monotonic()
        self.teacher.embed_images(crops)
        return Probe(crop_s, (time.monotonic() - since) / size, self.teacher.peak_memory_bytes())


def _fixed_size(items: Iterator[tuple[np.ndarray, Tensor]], size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The same rows and pixels, `size` at a time; fewer at the end."""
    rows: list[np.ndarray] = []
    pixels: list[Tensor] = []
    waiting = 0
    for some_rows, some_pixels in items:
        rows.append(some_rows)
        pixels.append(some_pixels)
        waiting += len(some_rows)
        if waiting >= size:
            all_rows, all_pixels = np.concatenate(rows), torch.cat(pixels)
            whole = waiting - waiting % size
            for start in range(0, whole, size):
                yield all_rows[start : start + size], all_pixels[start : start + size]
            rows, pixels, waiting = [all_rows[whole:]], [all_pixels[whole:].clone()], waiting - whole
    if waiting:
        yield np.concatenate(rows), torch.cat(pixels)
