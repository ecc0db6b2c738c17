"""From files to embeddings, in order and in bounded memory: who reads and cuts pictures while the model computes.

Without workers, threads carry a batch each from its files to its embeddings: on a CPU one a core, so that no core waits
for another. With workers, those processes read and cut, and the model's threads embed what they hand over, the next
batch on its way to the GPU while one is computed.
"""

import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hdovd.cache.picture_files import PictureFile
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.pipelines.embedding.embedders import Batch, CropJob, Cutter, Embedder, read_picture

SHARED_MEMORY = "/dev/shm"
GPU_THREADS = 2  # one batch on its way to the GPU and back while another is computed
PICTURES_KEPT = 4  # and one a thread: the boxes of a picture may go on in the next batch, which another thread is at
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A batch to make: inputs from some pictures, `size` with what fills it up. `rows`: of the level, counted from its
    first. `last`: of its part.
    """

    level: Level
    jobs: Sequence[CropJob]
    size: int
    rows: np.ndarray
    last: bool


@dataclass(frozen=True, slots=True)
class Embedded:
    """Embeddings (m, D) float32 of a batch's rows and what filled it up; by image id why a picture could not be read,
    and the file of one that could.
    """

    rows: np.ndarray
    problems: dict[int, str]
    files: dict[int, PictureFile]


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

    def batches(self, size: int) -> Iterator[Wanted]:
        """In row order, all of the shape that `size` crops have, the last one filled up."""
        embedder = self.embedder
        groups = embedder.groups(self.start + np.flatnonzero(self.missing), size)
        for number, some in enumerate(groups, 1):
            yield Wanted(embedder.level, embedder.jobs(some), embedder.places(size), some, number == len(groups))

    def take(self, batch: Wanted, answer: Embedded) -> None:
        """Enter the embeddings of a batch."""
        blank = np.repeat([job.image_id in answer.problems for job in batch.jobs], [job.rows for job in batch.jobs])
        self.embedding[batch.rows - self.start] = np.where(blank[:, None], 0, answer.rows[: len(batch.rows)])
        self.failed |= answer.problems
        self.files |= answer.files


def embed(
    wanted: Iterable[Wanted], embedders: Mapping[Level, Embedder], device: torch.device, workers: int
) -> Iterator[Embedded]:
    """The embeddings of every batch, in order. `wanted` is read no further ahead than the work needs."""
    wanted = iter(wanted)
    first = next(wanted, None)
    if first is None:  # no process and no thread for nothing
        return
    wanted = chain([first], wanted)

    def answer(level: Level, batch: Batch) -> Embedded:
        return Embedded(embedders[level].encode(batch), batch.problems, batch.files)

    on_gpu, workers = device.type == "cuda", _that_fit(workers, first, embedders[first.level].input_size)
    threads = GPU_THREADS if on_gpu and workers else torch.get_num_threads()
    picture = read_picture if workers else lru_cache(threads + PICTURES_KEPT)(read_picture)
    batches = _Batches({level: Cutter(e.fit, e.input_size, picture) for level, e in embedders.items()})
    with own_threads(threads) as pool:
        if workers:
            loader = DataLoader(batches, sampler=wanted, batch_size=None, num_workers=workers, pin_memory=on_gpu)
            yield from in_order(pool, lambda made: answer(*made), _made(loader), 2 * threads)
        else:
            yield from in_order(pool, lambda w: answer(*batches[w]), wanted, 2 * threads)


def _that_fit(workers: int, wanted: Wanted, input_size: tuple[int, int]) -> int:
    """As many workers as shared memory has room for, two batches each: containers often have little of it."""
    batch = wanted.size * 3 * input_size[0] * input_size[1]
    try:
        fit = shutil.disk_usage(SHARED_MEMORY).free // (2 * batch)
    except OSError:
        return workers
    if fit < workers:
        tqdm.write(
            f"--workers {workers}: {SHARED_MEMORY} has room for the batches of {fit} (docker run --shm-size 16g gives "
            f"it more)",
            file=sys.stderr,
        )
    return min(fit, workers)


def _made(loader: Iterable[A]) -> Iterator[A]:
    """What workers make. Raises HdovdError if one of them dies."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise HdovdError(
            f"{str(error).splitlines()[0].rstrip('. ')}. Out of memory? Fewer --workers or a smaller --batch need "
            f"less. What is finished is kept: the same command goes on"
        ) from error


@contextmanager
def own_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch computes alone, however many cores there are."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what later threads start from


def in_order(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """`function` of every item, in order, at most `ahead` of them begun before their answer is taken. After an error it
    is the pool's to drop what waits, as `own_threads` does.
    """
    begun: deque[Future[B]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


class _Batches(Dataset[tuple[Level, Batch]]):
    """A data set whose indices are descriptions of batches."""

    def __init__(self, cutters: Mapping[Level, Cutter]) -> None:
        self._cutters = cutters

    def __getitem__(self, wanted: Wanted) -> tuple[Level, Batch]:
        return wanted.level, self._cutters[wanted.level].batch(wanted.jobs, wanted.size)
