"""The boxes of a set that are nearest to a query. One pass over all of them, block by block: exact, in float32, and in
the memory of a block. Or an approximate index: faiss's inverted lists (IVF) of rows as bytes (SQ8). It offers
candidates; their exact cosines are those of the cache's own rows.

The index is a part of the instance product of its own, `index-KEY`, and of no level: no set and no run depends on it.
n rows of a block, Q queries, D embedding size.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from shlex import join
from typing import Any

import numpy as np
import torch

from hdovd.cache import INDEX, KeyInputs, Level, Product, key_of
from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError, counted, log
from hdovd.pipelines.common.console import size
from hdovd.pipelines.extraction.source import CacheSet

BLOCK_ROWS = 1_024  # as float32 they fit in a processor's cache
MOST_COMPARED = 200_000  # rows that are compared each with each
Choice = Callable[[InstanceRows], np.ndarray]  # rows -> (n,) bool, those that are asked for
Value = Callable[[InstanceRows, np.ndarray], np.ndarray]  # rows, cosines (n, Q) -> (n,), what they are ranked by


@dataclass(slots=True)
class Best:
    """The `count` largest values that were seen, best first, with what they are of; of equal ones the first."""

    count: int
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: np.ndarray, rows: np.ndarray) -> None:
        """values (n,), rows (n,) or (n, 2). Values that are no numbers are left out."""
        known = ~np.isnan(values)
        values = np.concatenate([self.values, values[known]])
        rows = np.concatenate([self.rows.reshape(-1, *rows.shape[1:]), rows[known]])
        order = np.argsort(-values, kind="stable")[: self.count]
        self.values, self.rows = values[order], rows[order]

    def pairs(self) -> Iterator[tuple[float, Any]]:
        """Value and row, best first."""
        return zip(self.values.tolist(), self.rows.tolist(), strict=True)


def best_rows(cache: FeatureCache, queries: np.ndarray, count: int, value: Value) -> Best:
    """The rows with the largest `value` of their cosines with queries (Q, D) of norm 1; none whose picture could not be
    read.
    """
    columns, best = torch.from_numpy(np.ascontiguousarray(queries.T, np.float32)), Best(count)
    wide = torch.empty(BLOCK_ROWS, len(columns))  # memory that is new for every block costs more than the product
    for start, rows in cache.blocks(BLOCK_ROWS):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing is written there
            some = wide[: len(rows.box)].copy_(torch.from_numpy(rows.embedding))
        cosines = some @ columns / some.norm(dim=1, keepdim=True)  # of rows of zeros no numbers
        best.add(value(rows, cosines.numpy()), start + np.arange(len(some)))
    return best


def nearest_rows(cache: FeatureCache, query: np.ndarray, count: int, chosen: Choice) -> Best:
    """The chosen rows with the largest cosines with `query` (D,) of norm 1."""
    return best_rows(cache, query[None], count, lambda rows, found: np.where(chosen(rows), found[:, 0], np.nan))


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


LISTS, ROWS_PER_LIST = 2, 64  # lists, times the square root of the rows; rows that a list's centre is fitted to
# "file": faiss's own name for the form of its file. With another value of any of these it is another index.
SETTINGS = {"kind": "IVF,SQ8", "lists": LISTS, "rows_per_list": ROWS_PER_LIST, "file": "faiss IwSq"}
# Lists that are looked into, at least, and of all: texts, far from all rows, need many (benchmarks/bench_index.py).
LEAST_PROBED, PROBED = 32, 1 / 8
CANDIDATES = 32  # times what is asked for: filters may leave one in so many
TRIED, COUNT = 10, 20  # queries of a kind that recall is measured by, and rows that each asks for


def _faiss() -> Any:
    """Raises HdovdError without it."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise HdovdError(f'an index needs faiss: pip install "hdovd[index]" ({error})') from error


def index_part(product: Product) -> tuple[str, KeyInputs]:
    """What an index of the product is recorded under, and what it is made from: the checksums of all rows too, which
    may be made again under one key.
    """
    rows = key_of({str(part): record["objects"] for part, record in product.records().items()})
    inputs = {"instance": product.key, "rows": rows, **SETTINGS}
    return f"{INDEX}{key_of(inputs)}", inputs


class RowIndex:
    """The index of a set, sound and open: of a local cache mapped, else in memory."""

    def __init__(self, cache: FeatureCache, *words: str) -> None:
        """`words`: more of the command that makes it. Raises HdovdError if the set has none, or it is damaged."""
        faiss, product = _faiss(), cache.product(Level.INSTANCE)
        part, _ = index_part(product)
        name = f"{product.prefix}/{part}"
        if not product.is_finished(part):
            command = join(["hdovd", "cache", "index", cache.url, *words])
            raise HdovdError(f"{cache.url} has no index of {product} as it is now: {command}")
        product.require_sound(part)  # before the file is parsed
        if path := product.folder.path(name):
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            faiss.downcast_InvertedLists(self._index.invlists).prefetch_nthread = 0  # else 32 threads a query
        else:
            self._index = faiss.deserialize_index(np.frombuffer(product.folder.read(name), np.uint8))
        self._cache, self.rows, self._parameters = cache, product.rows, faiss.SearchParametersIVF

    def best(self, query: np.ndarray, count: int, chosen: Choice) -> Best:
        """As `nearest_rows`, of candidates; where too few of these are chosen, all rows are compared."""
        wanted, lists = min(CANDIDATES * count, self.rows), self._index.nlist
        probed = max(LEAST_PROBED, int(PROBED * lists)) if wanted < self.rows else lists
        _, found = self._index.search(query[None].astype(np.float32), wanted, params=self._parameters(nprobe=probed))
        best, numbers = Best(count), np.sort(found[found >= 0])
        rows = self._cache.rows_at(numbers)
        best.add(np.where(chosen(rows), normalised_rows(rows.embedding) @ query, np.nan), numbers)
        if wanted == self.rows or len(best.rows) == count:
            return best
        log("too few of the rows that the index offers fit the filters: all rows are compared")
        return nearest_rows(self._cache, query, count, chosen)


def index_rows(config: CacheSet) -> None:
    """Build the index of a set unless it is there, and say how well it finds, and how fast. Raises HdovdError."""
    config.check()
    cache = FeatureCache(config.cache, config.features)
    product = cache.product(Level.INSTANCE)
    part, inputs = index_part(product)
    with product.folder.claim(f"{product.prefix}/{part}", wait=True):
        if not product.is_finished(part):
            since, data = time.perf_counter(), _built(cache, product.rows)
            for name in [name for name in product.folder.sizes(product.prefix) if f"/{INDEX}" in name]:
                product.folder.delete(name)  # indices of other rows, records first, and what was killed
            ProductWriter(product).store(part, {part: data}, {}, inputs=inputs)
            log(f"built in {time.perf_counter() - since:.1f} s: {size(len(data))}")
    log(f"index of {product.rows:,d} rows: {product.prefix}/{part}")
    _measure(cache, RowIndex(cache))


def _built(cache: FeatureCache, count: int) -> bytes:
    """The file of an index of all rows but those of zeros. Raises HdovdError if all are."""
    faiss, lists = _faiss(), int(LISTS * count**0.5)
    sample = _some(cache, ROWS_PER_LIST * lists)
    if not len(sample):
        raise HdovdError(f"{cache.url} has no rows to index: it has no boxes, or none of their pictures could be read")
    index = faiss.index_factory(cache.dim, f"IVF{min(lists, len(sample))},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # no warning of small sets
    index.train(sample.astype(np.float32))
    for start, rows in cache.blocks(BLOCK_ROWS):
        there = np.flatnonzero(rows.embedding.any(axis=1))
        index.add_with_ids(normalised_rows(rows.embedding[there]), start + there)
    return bytes(faiss.serialize_index(index))


def _some(cache: FeatureCache, count: int) -> np.ndarray:
    """(n, D), rows of the set at random, but those of zeros."""
    numbers = np.random.default_rng(0).permutation(len(cache.row_images()))[:count]
    rows = cache.rows_at(np.sort(numbers)).embedding
    return np.asarray(rows[rows.any(axis=1)])


def _measure(cache: FeatureCache, index: RowIndex) -> None:
    """Say how many of the best rows the index finds, and how fast, by rows and by texts of the set."""
    kinds = {"rows": _some(cache, TRIED)}
    if levels := [level for level in (Level.NOUN, Level.CLASS) if level in cache.levels()]:
        texts = np.concatenate([*map(cache.embeddings, levels)])
        kinds["texts"] = np.random.default_rng(0).permutation(texts)[:TRIED]
    for kind, queries in kinds.items():
        asked, times, found = normalised_rows(queries), [time.perf_counter()], list[list[Best]]()
        for best in (index.best, partial(nearest_rows, cache)):
            found.append([best(query, COUNT, lambda rows: np.ones(len(rows.box), bool)) for query in asked])
            times.append(time.perf_counter())
        recall = np.mean([np.isin(exact.rows, one.rows) for one, exact in zip(*found, strict=True)])
        fast, slow = len(queries) / np.diff(times)
        log(
            f"recall@{COUNT} against the exact scan: {recall:.3f} by {len(queries)} of its {kind}; queries a "
            f"second, one after another: {fast:.1f} by the index, {slow:.1f} by the exact scan"
        )
