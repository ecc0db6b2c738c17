"""One pass over all boxes of a set, block by block: exact, in float32, and in the memory of a block.

n rows of a block, Q queries, D embedding size.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.schema import STORED_NORM_TOLERANCE
from hdovd.core.errors import HdovdError, counted

BLOCK_ROWS = 1_024  # as float32 they fit in a processor's cache
BLOCKS_AT_ONCE = 16  # that threads share
MOST_COMPARED = 200_000  # rows that are compared each with each
Choice = Callable[[InstanceRows], np.ndarray]  # rows -> (n,) bool, those that are asked for
Value = Callable[
    [InstanceRows, np.ndarray], np.ndarray
]  # rows, cosines (n, Q) -> (n,), what they are ranked by; it scales with them


@dataclass(slots=True)
class Best:
    """The `count` largest values that were seen, best first, with what they are of; of equal ones the first."""

    count: int
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def enough(self) -> float:
        """What a value has to exceed to be kept."""
        return float(self.values[-1]) if len(self.values) == self.count else -np.inf

    def add(self, values: np.ndarray, rows: np.ndarray) -> None:
        """values (n,), rows (n,) or (n, 2). Values that are no numbers are left out."""
        found = np.flatnonzero(values > self.enough)
        if len(found):
            values = np.concatenate([self.values, values[found]])
            rows = np.concatenate([self.rows.reshape(-1, *rows.shape[1:]), rows[found]])
            order = np.argsort(-values, kind="stable")[: self.count]
            self.values, self.rows = values[order], rows[order]

    def pairs(self) -> Iterator[tuple[float, Any]]:
        """Value and row, best first."""
        return zip(self.values.tolist(), self.rows.tolist(), strict=True)


def best_rows(cache: FeatureCache, queries: np.ndarray, count: int, value: Value) -> Best:
    """The rows with the largest `value` of their cosines with queries (Q, D) of norm 1; none whose picture could not be
    read.

    Rows are stored rounded, so their norms are 1 but for STORED_NORM_TOLERANCE: `value` is asked with plain products,
    and the norm is taken of those rows alone that may be among the best.
    """
    columns = torch.from_numpy(np.ascontiguousarray(queries.T, np.float32))
    best = Best(count)
    with _single_threads(torch.get_num_threads()) as pool:
        for start, rows in cache.blocks(BLOCKS_AT_ONCE * BLOCK_ROWS):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written there
                stored = torch.from_numpy(rows.embedding)
            cosines = torch.cat([*pool.map(lambda some: some.float() @ columns, stored.split(BLOCK_ROWS))])
            found = value(rows, cosines.numpy())
            near = np.flatnonzero(found + 2 * STORED_NORM_TOLERANCE * np.abs(found) > best.enough)
            with np.errstate(divide="ignore", invalid="ignore"):  # rows of zeros
                best.add(found[near] / np.linalg.norm(rows.embedding[near].astype(np.float32), axis=1), start + near)
    return best


def nearest_rows(cache: FeatureCache, query: np.ndarray, count: int, chosen: Choice) -> Best:
    """The chosen rows with the largest cosines with `query` (D,) of norm 1."""
    return best_rows(cache, query[None], count, lambda rows, found: np.where(chosen(rows), found[:, 0], np.nan))


@contextmanager
def _single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each do what torch is asked for alone: to share work as small as a block's costs more than it."""
    try:
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)  # torch gives threads of later the number that was set last


def mean_row(cache: FeatureCache, chosen: Choice) -> np.ndarray:
    """(D,) float32, the sum of the chosen rows at norm 1: of zeros if there are none."""
    rows = (normalised_rows(rows.embedding[chosen(rows)]) for _, rows in cache.blocks(BLOCK_ROWS))
    return np.asarray(sum(block.sum(axis=0) for block in rows))


def chosen_rows(cache: FeatureCache, chosen: Choice) -> np.ndarray:
    """(m,) numbers of the chosen rows. Raises HdovdError for more than MOST_COMPARED."""
    found = np.concatenate([start + np.flatnonzero(chosen(rows)) for start, rows in cache.blocks(BLOCK_ROWS)])
    if len(found) > MOST_COMPARED:
        raise HdovdError(
            f"{counted(len(found), 'box', 'boxes')} to compare each with each, {MOST_COMPARED:,d} at most: ask for "
            "fewer with --class, --noun, --source, --min-side or --score"
        )
    return found


def alike_pairs(rows: np.ndarray, groups: np.ndarray, count: int, least: float) -> Best:
    """Pairs (2,) of rows (m, D) of norm 1 or 0 whose cosine is at least `least`, of two groups (m,), the most alike
    first.
    """
    best = Best(count)
    for start in range(0, len(rows), BLOCK_ROWS):
        for other in range(start, len(rows), BLOCK_ROWS):
            found = rows[start : start + BLOCK_ROWS] @ rows[other : other + BLOCK_ROWS].T
            pairs = np.argwhere(found >= least) + np.array([start, other])
            pairs = pairs[(pairs[:, 0] < pairs[:, 1]) & (groups[pairs[:, 0]] != groups[pairs[:, 1]])]
            best.add(found[pairs[:, 0] - start, pairs[:, 1] - other], pairs)
    return best
