"""The embeddings of one part of the image or the instance level while they are made: in which batches, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hdovd.cache.picture_files import PictureFile
from hdovd.pipelines.embedding.embedders import Embedder
from hdovd.pipelines.embedding.feed import Embedded, Wanted


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

    embedder: Embedder
    start: int
    embedding: np.ndarray
    missing: np.ndarray
    failed: dict[int, str] = field(default_factory=dict)
    files: dict[int, PictureFile] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[RowBatch]:
        """In row order, all of the shape that `size` crops have, the last one filled up."""
        rows = self.start + np.flatnonzero(self.missing)
        groups = self.embedder.groups(rows, size)
        for number, some in enumerate(groups, 1):
            yield RowBatch(some, Wanted(self.embedder.level, self.embedder.jobs(some), self.embedder.places(size)), number == len(groups))

    def take(self, batch: RowBatch, answer: Embedded) -> None:
        """Enter the embeddings of a batch."""
        embeddings, start = answer.rows[: len(batch.rows)], 0
        for job in batch.wanted.jobs:
            if job.image_id in answer.problems:
                embeddings[start : start + job.rows] = 0
            start += job.rows
        self.embedding[batch.rows - self.start] = embeddings
        self.failed |= answer.problems
        self.files |= answer.files
