"""The embeddings of one part of the image or the instance level while they are made: in which batches, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hdovd.cache.schema import Level
from hdovd.coco import Split
from hdovd.pipelines.box_table import BoxTable
from hdovd.pipelines.crop_recipe import CropRecipe
from hdovd.pipelines.crops import CropJob
from hdovd.pipelines.feeding import Embedded, Wanted


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where rows come from: the pictures, the boxes, and how a box is cut out."""

    split: Split
    table: BoxTable
    recipe: CropRecipe

    def crops_a_row(self, level: Level) -> int:
        return len(self.recipe.scales) if level is Level.INSTANCE else 1

    def jobs(self, level: Level, rows: np.ndarray) -> list[CropJob]:
        """What to read and cut for sorted rows of a level, image by image."""
        number = rows if level is Level.IMAGE else np.searchsorted(self.table.offset, rows, "right") - 1
        cuts = np.flatnonzero(np.diff(number)) + 1
        jobs, place = [], 0
        for mine in np.split(rows, cuts) if len(rows) else ():
            image = self.split.images[number[place]]
            regions = None if level is Level.IMAGE else self.recipe.regions(self.table.box[mine], image.width, image.height)
            jobs.append(CropJob(image.id, self.split.path(image), image.width, image.height, regions, place * self.crops_a_row(level)))
            place += len(mine)
        return jobs


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of a level, counted from its first, and the batch that they are embedded in."""

    rows: np.ndarray
    wanted: Wanted
    last: bool


@dataclass(slots=True)
class PartRows:
    """Rows `start` to `start + len(embedding)` of a level. embedding (n, D) float16, zeros for the images in `failed`.

    `missing`: of these rows, the ones to embed.
    """

    pictures: Pictures
    level: Level
    start: int
    embedding: np.ndarray
    missing: np.ndarray
    failed: dict[int, str] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[RowBatch]:
        """In row order, of one fixed number of crops, the last one filled up."""
        rows, step = self.start + np.flatnonzero(self.missing), max(1, size // self.pictures.crops_a_row(self.level))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            crops = max(size, len(some) * self.pictures.crops_a_row(self.level))
            yield RowBatch(some, Wanted(self.pictures.jobs(self.level, some), crops), first + step >= len(rows))

    def take(self, batch: RowBatch, answer: Embedded) -> None:
        """Enter the embeddings of a batch."""
        crops = self.pictures.crops_a_row(self.level)
        embeddings = mean_of(answer.rows[: len(batch.rows) * crops], crops)
        for job in batch.wanted.jobs:
            if job.image_id in answer.problems:
                embeddings[job.place // crops : (job.place + job.count) // crops] = 0
        self.embedding[batch.rows - self.start] = embeddings
        self.failed |= answer.problems


def mean_of(embeddings: np.ndarray, crops: int) -> np.ndarray:
    """(n * crops, D) normalised embeddings -> (n, D): the normalised mean of each row's crops."""
    if crops == 1:
        return embeddings
    mean = embeddings.reshape(-1, crops, embeddings.shape[1]).mean(axis=1)
    normalised: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return normalised
