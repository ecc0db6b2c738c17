"""Approximate indices of rows like a cache's, side by side: time to build, bytes, memory, and at the least effort that
reaches a recall, queries a second; beside the exact product. Of faiss and usearch, where they are installed.

    python benchmarks/run.py bench_index [--rows 300000] [--cache hdovd-demo/cache]

Rows are drawn: centres in a cone, as those of CLIP are, and rows about them whose cosines within a cluster are 0.6 to
0.8; or those of a cache. Half the queries are rows, half lie as far from all rows as texts lie from crops. Each index
offers candidates, some times as many as are asked for, whose exact cosines are taken from the rows. One thread, each
index in a process of its own; memory is what the process has beyond what it had, of opening and asking without what is
mapped.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from arguments import parsed, workplace

from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.core import HdovdError
from hdovd.pipelines.runs import table_lines

KINDS = {  # name: how many times as many candidates are taken as are asked for
    "faiss IVF,SQ8": 2,
    "faiss IVF,SQfp16": 2,
    "faiss IVF,RaBitQ": 10,
    "faiss IVF,PQx4fs": 10,
    "faiss HNSW16,SQfp16": 2,
    "usearch f16": 2,
    "usearch i8": 2,
}
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # lists that are looked into; of HNSW: ef
HEAD = ("index", "build s", "build MB", "bytes a row", "open MB", "effort", "recall: rows", "texts", "queries/s")


@dataclass(frozen=True)
class IndexBench:
    """`rows` of `dim` values about `centres`, or those of the set default of a `cache`; `queries` of either kind."""

    rows: int = 300_000
    dim: int = 512
    centres: int = 2_000
    queries: int = 100
    count: int = 20
    recall: float = 0.95
    cache: Path | None = None
    kinds: tuple[str, ...] = tuple(KINDS)


@dataclass(frozen=True)
class Question:
    """`rows` (n, D) float16 in a file; `queries` (Q, D) float32, the first half of them rows; `best` (Q, count)."""

    file: Path
    shape: tuple[int, int]
    queries: np.ndarray
    best: np.ndarray
    recall: float

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Rows as float32, read and not mapped."""
        with self.file.open("rb") as file:
            for start in range(0, self.shape[0], 16_384):
                count = min(16_384, self.shape[0] - start)
                rows = np.frombuffer(file.read(2 * count * self.shape[1]), np.float16)
                yield start, rows.reshape(count, -1).astype(np.float32)


def write_rows(file: Path, bench: IndexBench) -> np.ndarray:
    """(n, D) float16 of norm 1, mapped; none of zeros."""
    rng = np.random.default_rng(0)
    with file.open("wb") as out:
        if bench.cache is not None:
            for _, block in FeatureCache(bench.cache).blocks(16_384):
                out.write(block.embedding[block.embedding.any(axis=1)].tobytes())
            return np.memmap(file, np.float16, "r").reshape(-1, FeatureCache(bench.cache).dim)
        centres = normalised_rows(
            rng.standard_normal((bench.centres, bench.dim)) + 0.6 * rng.standard_normal(bench.dim)
        )
        spread = rng.uniform(0.5, 0.82, bench.centres) / np.sqrt(bench.dim)
        for start in range(0, bench.rows, 16_384):
            mine = rng.integers(0, bench.centres, min(16_384, bench.rows - start))
            noise = rng.standard_normal((len(mine), bench.dim), np.float32) * spread[mine, None]
            out.write(normalised_rows(centres[mine] + noise).astype(np.float16).tobytes())
    return np.memmap(file, np.float16, "r").reshape(-1, bench.dim)


def memory_mb(name: str) -> float:
    """Of this process: VmHWM, the most that it had, or RssAnon, what it has without what is mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


class Faiss:
    def __init__(self, kind: str) -> None:
        import faiss

        self.faiss: Any = faiss
        self.kind = kind
        faiss.omp_set_num_threads(1)

    def build(self, question: Question, file: Path) -> None:
        count, dim = question.shape
        lists = int(2 * np.sqrt(count))
        name = self.kind.replace("IVF", f"IVF{lists}").replace("PQ", f"PQ{dim // 4}")
        index = self.faiss.index_factory(dim, name, self.faiss.METRIC_INNER_PRODUCT)
        rows = np.memmap(question.file, np.float16, "r").reshape(count, dim)
        chosen = np.random.default_rng(0).choice(count, min(64 * lists, count), replace=False)
        index.train(rows[np.sort(chosen)].astype(np.float32))
        for _, block in question.blocks():
            index.add(block)
        self.faiss.write_index(index, str(file))

    def open(self, file: Path) -> None:
        self.index: Any = self.faiss.read_index(str(file), self.faiss.IO_FLAG_MMAP)
        if "IVF" in self.kind and "fs" not in self.kind:
            self.faiss.downcast_InvertedLists(self.index.invlists).prefetch_nthread = 0  # else 32 threads a query

    def ask(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        how = (
            self.faiss.SearchParametersIVF(nprobe=effort)
            if "IVF" in self.kind
            else self.faiss.SearchParametersHNSW(efSearch=effort)
        )
        found: np.ndarray = self.index.search(query[None], count, params=how)[1][0]
        return found[found >= 0]


class Usearch:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def build(self, question: Question, file: Path) -> None:
        from usearch.index import Index

        index = Index(ndim=question.shape[1], metric="cos", dtype=self.kind, connectivity=16, expansion_add=64)
        for start, block in question.blocks():
            index.add(np.arange(start, start + len(block)), block, threads=1)
        index.save(str(file))

    def open(self, file: Path) -> None:
        from usearch.index import Index

        self.index: Any = Index.restore(str(file), view=True)

    def ask(self, query: np.ndarray, count: int, effort: int) -> np.ndarray:
        self.index.expansion_search = effort
        return np.asarray(self.index.search(query, count, threads=1).keys, np.int64)


def measured(kind: str, question: Question, file: Path) -> tuple[str, ...]:
    """The cells of a line. Called twice a process would measure less memory than there is."""
    library, _, form = kind.partition(" ")
    index = (Faiss if library == "faiss" else Usearch)(form)
    rows = np.memmap(question.file, np.float16, "r", 0, question.shape)
    before, since = memory_mb("VmHWM"), time.perf_counter()
    index.build(question, file)
    cells = [f"{time.perf_counter() - since:.0f}", f"{memory_mb('VmHWM') - before:.0f}"]
    del index
    index = (Faiss if library == "faiss" else Usearch)(form)
    held = memory_mb("RssAnon")
    index.open(file)
    count = question.best.shape[1]
    for effort in EFFORTS:
        recalls, since = [], time.perf_counter()
        for query, best in zip(question.queries, question.best, strict=True):
            found = index.ask(query, KINDS[kind] * count, effort)
            order = np.argsort(-(normalised_rows(rows[found]) @ query))[:count]
            recalls.append(len(np.intersect1d(found[order], best)) / count)
        seconds = time.perf_counter() - since
        halves = [float(np.mean(half)) for half in np.array_split(recalls, 2)]
        if min(halves) >= question.recall:
            break
    cells += [f"{file.stat().st_size / len(rows):.0f}", f"{memory_mb('RssAnon') - held:.0f}", f"{effort}"]
    return kind, *cells, *(f"{half:.3f}" for half in halves), f"{len(recalls) / seconds:.0f}"


def bench_index(bench: IndexBench, place: Path) -> Iterator[str]:
    """The lines to print, the table last."""
    rows = write_rows(place / "rows", bench)
    rng = np.random.default_rng(1)
    own = normalised_rows(rows[rng.choice(len(rows), bench.queries, replace=False)])
    near = normalised_rows(rows[rng.choice(len(rows), bench.queries, replace=False)])
    noise = normalised_rows(rng.standard_normal(near.shape))
    queries = np.concatenate([own, normalised_rows(0.3 * near + noise)])
    since = time.perf_counter()
    cosines = np.concatenate(
        [normalised_rows(rows[at : at + 16_384]) @ queries.T for at in range(0, len(rows), 16_384)]
    )
    best = np.argpartition(-cosines, bench.count, axis=0)[: bench.count].T
    yield f"{len(rows):,d} rows of {rows.shape[1]} values, the best {bench.count}; recall {bench.recall} at least"
    yield f"exact, {len(queries)} queries at once: {len(queries) / (time.perf_counter() - since):.0f} queries/s"
    question, lines = Question(place / "rows", rows.shape, queries, best, bench.recall), list[tuple[str, ...]]()
    for kind in bench.kinds:
        if kind not in KINDS:
            raise HdovdError(f"{kind}: expected one of {', '.join(KINDS)}")
        if find_spec(kind.split()[0]) is None:
            yield f"{kind}: left out, it is not installed"
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            lines.append(pool.apply(measured, (kind, question, place / "index")))
    yield from table_lines(HEAD, lines, set(HEAD[1:]))


def main() -> None:
    bench = parsed(IndexBench, __doc__)
    with workplace() as place:
        for line in bench_index(bench, place):
            print(line, flush=True)


if __name__ == "__main__":
    main()
