"""One pass over all boxes of a set, block by block: exact, in float32, and in the memory of a block.

n rows of a block, Q queries, D embedding size, M rows in all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError, counted
from hdovd.data.coco import Split

BLOCK_ROWS = 2_048  # as float32 they fit in a processor's cache
MOST_COMPARED = 200_000  # rows that are compared each with each
Choice = Callable[[InstanceRows], np.ndarray]  # rows -> (n,) bool, those that are asked for


@dataclass(frozen=True, slots=True)
class BaseLabels:
    """The class of every base box, by annotation id: ids (A,) int64, sorted; labels (A,) int64, places in `names`."""

    ids: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, split: Split, names: tuple[str, ...]) -> "BaseLabels":
        """Those of the annotations. names: of the base classes."""
        none = [np.zeros(0, np.int64)]
        ids = np.concatenate([image.annotation_ids for image in split.images] or none)
        labels = np.concatenate([image.labels for image in split.images] or none)
        order = np.argsort(ids)
        return cls(ids[order], labels[order], names)

    def of_rows(self, rows: InstanceRows) -> np.ndarray:
        """(n,) int64, -1 for what is no base box, or has no annotation here."""
        if not len(self.ids):
            return np.full(len(rows.source), -1)
        place = np.minimum(np.searchsorted(self.ids, rows.annotation_id), len(self.ids) - 1)
        known = (rows.source == Source.BASE_BOX) & (self.ids[place] == rows.annotation_id)
        return np.where(known, self.labels[place], -1)


@dataclass(slots=True)
class Best:
    """The `count` largest values that were seen, best first, with the rows that they are of; of equal ones the first
    that came.
    """

    count: int
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: np.ndarray, rows: np.ndarray) -> None:
        """values (n,), rows (n, ...). Values that are no numbers are left out."""
        enough = self.values[-1] if len(self.values) == self.count else -np.inf
        found = np.flatnonzero(values > enough)
        if len(found):
            values = np.concatenate([self.values, values[found]])
            rows = np.concatenate([self.rows.reshape(-1, *rows.shape[1:]), rows[found]])
            order = np.argsort(-values, kind="stable")[: self.count]
            self.values, self.rows = values[order], rows[order]

    def pairs(self) -> Iterator[tuple[float, Any]]:
        """Value and row, best first."""
        return zip(self.values.tolist(), self.rows.tolist(), strict=True)


def cosines(cache: FeatureCache, queries: np.ndarray) -> Iterator[tuple[int, InstanceRows, np.ndarray]]:
    """The number of a block's first row, the rows, and their cosines (n, Q) float32 with queries (Q, D) of norm 1; not
    a number where a picture could not be read.
    """
    columns = torch.from_numpy(np.ascontiguousarray(queries.T, np.float32))
    wide = torch.empty(BLOCK_ROWS, len(columns))
    for start, rows in cache.blocks(BLOCK_ROWS):
        block = wide[: len(rows.embedding)].copy_(torch.from_numpy(rows.embedding))
        yield start, rows, (block @ columns / torch.linalg.vector_norm(block, dim=1, keepdim=True)).numpy()


def best_rows(cache: FeatureCache, query: np.ndarray, count: int, chosen: Choice) -> Best:
    """The rows whose cosine with a query (D,) of norm 1 is the largest."""
    best = Best(count)
    for start, rows, found in cosines(cache, query[None]):
        mask = np.flatnonzero(chosen(rows))
        best.add(found[mask, 0], start + mask)
    return best


def suspicious_rows(cache: FeatureCache, texts: np.ndarray, labels: BaseLabels, count: int, chosen: Choice) -> Best:
    """Base boxes whose crop is more like the text (K, D) of another class than that of their own, by how much: the row
    and the other class.
    """
    best = Best(count)
    for start, rows, found in cosines(cache, texts):
        own = labels.of_rows(rows)
        mask = np.flatnonzero(chosen(rows) & (own >= 0))
        found, places = found[mask], (np.arange(len(mask)), own[mask])
        mine = found[places]
        found[places] = -np.inf
        other = found.argmax(axis=1)
        more = found.max(axis=1) - mine
        best.add(more[more > 0], np.stack([start + mask, other], axis=1)[more > 0])
    return best


def untypical_rows(cache: FeatureCache, count: int, chosen: Choice, what: str) -> Best:
    """The chosen rows that are least like their mean: values are cosines, turned in sign. Raises HdovdError, naming
    `what`, if there are none.
    """
    total = np.zeros(cache.dim, np.float64)
    for _, rows in cache.blocks(BLOCK_ROWS):
        total += normalised_rows(rows.embedding[chosen(rows)]).sum(axis=0)
    if not total.any():
        raise HdovdError(f"{cache.url} has no boxes of {what}")
    best = Best(count)
    for start, rows, found in cosines(cache, normalised_rows(total[None])):
        mask = np.flatnonzero(chosen(rows))
        best.add(-found[mask, 0], start + mask)
    return best


def chosen_rows(cache: FeatureCache, chosen: Choice) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (m,) of the chosen rows, and the rows (m, D) of norm 1 in float32. Raises HdovdError for more than
    MOST_COMPARED.
    """
    numbers, kept, count = [np.zeros(0, np.int64)], [np.zeros((0, cache.dim), np.float32)], 0
    for start, rows in cache.blocks(BLOCK_ROWS):
        mask = np.flatnonzero(chosen(rows))
        count += len(mask)
        if count <= MOST_COMPARED:
            numbers.append(start + mask)
            kept.append(normalised_rows(rows.embedding[mask]))
    if count > MOST_COMPARED:
        raise HdovdError(
            f"{counted(count, 'box', 'boxes')} to compare each with each, {MOST_COMPARED:,d} at most: ask for fewer "
            "with --class, --noun, --source, --min-side or --score"
        )
    return np.concatenate(numbers), np.concatenate(kept)


def alike_pairs(rows: np.ndarray, groups: np.ndarray, count: int, least: float) -> Best:
    """Pairs (2,) of rows (m, D) of norm 1 or 0 whose cosine is at least `least`, of two groups (m,), the most alike
    first.
    """
    best = Best(count)
    for start in range(0, len(rows), BLOCK_ROWS):
        mine = rows[start : start + BLOCK_ROWS]
        for other in range(start, len(rows), BLOCK_ROWS):
            found = mine @ rows[other : other + BLOCK_ROWS].T
            pairs = np.argwhere(found >= least) + np.array([start, other])
            pairs = pairs[(pairs[:, 0] < pairs[:, 1]) & (groups[pairs[:, 0]] != groups[pairs[:, 1]])]
            best.add(found[pairs[:, 0] - start, pairs[:, 1] - other], pairs)
    return best
