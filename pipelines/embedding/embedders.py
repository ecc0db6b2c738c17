"""Picture files in, embeddings out, in order and in bounded memory: how rows of a level become embeddings (`Embedder`),
from regions that `crop_recipe` gives, and who reads and cuts pictures while the model computes (`embed`).

Without workers, threads carry a batch each from its files to its embeddings: on a CPU one a core, so that no core waits
for another. With workers, those processes read and cut, and the model's threads embed what they hand over, the next
batch on its way to the GPU while one is computed.

Rows are counted from the level's first. open_clip is imported for dense boxes alone.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hdovd.cache import Level
from hdovd.cache.picture_files import PictureFile
from hdovd.core import HdovdError, log
from hdovd.core.picture_header import told
from hdovd.data import Exif, ImageBoxes
from hdovd.pipelines.common.images import read_annotated
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, DenseRecipe
from hdovd.pipelines.teachers.base import Teacher

if TYPE_CHECKING:
    from hdovd.pipelines.teachers.openclip import ClipTeacher

DEFAULT_SIDES = 3  # of a dense teacher, of the crop input: 672 pixels where that has 224
GPU_THREADS = 2  # one batch on its way to the GPU and back while another is computed
PICTURES_KEPT = 4  # and one a thread: the boxes of a picture may go on in the next batch, which another thread is at
SHARED_MEMORY = "/dev/shm"
A = TypeVar("A")
B = TypeVar("B")
NO_FILE = PictureFile(b"", b"", 0, 0)  # of a picture in memory


def cut(picture: Tensor, region: Sequence[int]) -> Tensor:
    """The pixels of a region xyxy of (3, h, w); black outside the picture."""
    x0, y0, x1, y1 = region
    if x0 >= 0 and y0 >= 0 and x1 <= picture.shape[2] and y1 <= picture.shape[1]:
        return picture[:, y0:y1, x0:x1]  # no copy
    inside = picture[:, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    left, top = min(max(-x0, 0), x1 - x0), min(max(-y0, 0), y1 - y0)
    return F.pad(inside, (left, x1 - x0 - left - inside.shape[2], top, y1 - y0 - top - inside.shape[1]))


@dataclass(frozen=True, slots=True)
class Picture:
    """pixels (3, h, w) uint8 RGB, and the file that they were read from."""

    pixels: Tensor
    file: PictureFile


def read_picture(path: Path, width: int, height: int, exif: Exif) -> Picture:
    """A picture as `images.read_image` reads it. Raises HdovdError."""
    with told(str(path)), path.open("rb") as file:
        stat, data = os.fstat(file.fileno()), file.read()
    found, either = read_annotated(path, width, height, data, exif)
    return Picture(torch.from_numpy(np.array(found)).permute(2, 0, 1), PictureFile.of(path, stat, data, either=either))


@dataclass(frozen=True, slots=True)
class CropJob:
    """One image, for `rows` rows of a level. `regions` (n, 4): what to cut out, xyxy pixels; None for the whole
    picture.

    `boxes` (rows, 4) float32: what the model is to look at, xyxy pixels of its input. `place`: of the first input in
    its batch.
    """

    image: ImageBoxes
    path: Path
    rows: int = 1
    place: int = 0
    regions: np.ndarray | None = None
    boxes: np.ndarray | None = None
    exif: Exif = Exif.APPLY

    @property
    def count(self) -> int:
        return 1 if self.regions is None else len(self.regions)


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs (count, 3, h, w) uint8, zeros where there is none; by image id why a picture could not be read; of each
    input the boxes; by image id the files that were read.
    """

    pixels: Tensor
    problems: dict[int, str]
    boxes: list[np.ndarray]
    files: dict[int, PictureFile] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """For torch's DataLoader, on the way to a GPU."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True, slots=True)
class Cutter:
    """Reads pictures and cuts them. `fit` is the model's own resizing, (3, h, w) uint8 -> (3, *size) uint8.

    A picture that cannot be read gives a reason instead of an error: one bad file must not end the extraction of a
    hundred thousand.
    """

    fit: Callable[[Tensor], Tensor]
    size: tuple[int, int]
    picture: Callable[[Path, int, int, Exif], Picture] = read_picture

    def batch(self, jobs: Sequence[CropJob], count: int) -> Batch:
        """The crops of some jobs at their places among `count`; channels last, as pictures come and convolutions are
        fastest.
        """
        inputs = torch.zeros(count, *self.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        batch = Batch(inputs, {}, [np.zeros((0, 4), np.float32)] * count)
        for job in jobs:
            if job.boxes is not None:
                batch.boxes[job.place] = job.boxes
            try:
                picture = self.picture(job.path, job.image.width, job.image.height, job.exif)
            except HdovdError as error:
                batch.problems[job.image.id] = str(error)
                continue
            batch.files[job.image.id] = picture.file
            pixels = picture.pixels
            crops = [pixels] if job.regions is None else (cut(pixels, region) for region in job.regions.tolist())
            for place, crop in enumerate(crops, job.place):
                batch.pixels[place] = self.fit(crop)
        return batch


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images in the order of a product's rows. box (n, 4) xyxy, absolute pixels; image i has `box[offset[i] : offset[i
    + 1]]`.
    """

    images: Sequence[ImageBoxes]
    path: Callable[[ImageBoxes], Path]
    offset: np.ndarray
    box: np.ndarray
    exif: Exif = Exif.APPLY


class Embedder:
    """Of one level, with one model: rows of which each is the mean of `crops` inputs. `fit`, `input_size`: as a
    `Teacher` has them, of this way's input. `jobs` read no files.
    """

    level = Level.INSTANCE
    crops = 1

    def __init__(self, teacher: Teacher, pictures: Pictures) -> None:
        self.teacher, self.pictures = teacher, pictures
        self.fit, self.input_size = teacher.fit, teacher.input_size

    def inputs(self) -> dict[str, Any]:
        """What of it determines embeddings, as JSON values: a part of the level's identity."""
        return {"preprocessing": self.teacher.preprocessing}

    def groups(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Sorted rows, batch by batch; `size`: of a batch in crops."""
        step = max(1, size // self.crops)
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    def places(self, size: int) -> int:
        """How many inputs of `input_size` a batch of so many crops has."""
        return max(size, self.crops)

    def encode(self, batch: Batch) -> np.ndarray:
        """(m, D) float32, L2-normalised: the rows of a batch in their order, then what filled it up. Called by several
        threads at once.
        """
        return mean_of(self.teacher.embed_images(batch.pixels), self.crops)

    def jobs(self, rows: np.ndarray) -> list[CropJob]:
        """What to read and cut for a batch, image by image."""
        number = self.images_of(rows)
        jobs, place, first = list[CropJob](), 0, 0
        for mine in np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(rows) else ():
            image = self.pictures.images[number[first]]
            path, cuts = self.pictures.path(image), self.cuts(image, mine)
            jobs.append(CropJob(image, path, len(mine), place, exif=self.pictures.exif, **cuts))
            first, place = first + len(mine), place + jobs[-1].count
        return jobs

    def embed(
        self, batches: Iterable[np.ndarray], picture: Callable[..., Picture] = read_picture
    ) -> tuple[np.ndarray, dict[int, str]]:
        """(n, D) float32, the rows of all batches (`groups`) in order, and by image id why a picture could not be read,
        whose rows mean nothing. `picture`: as of `Cutter`.
        """
        cutter, problems = Cutter(self.fit, self.input_size, picture), dict[int, str]()
        parts = [np.zeros((0, self.teacher.dim), np.float32)]
        for rows in batches:
            jobs = self.jobs(rows)
            batch = cutter.batch(jobs, sum(job.count for job in jobs))
            parts.append(self.encode(batch)[: len(rows)])
            problems |= batch.problems
        return np.concatenate(parts), problems

    def images_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's image."""
        return np.searchsorted(self.pictures.offset, rows, "right") - 1

    def cuts(self, image: ImageBoxes, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a job of some rows of an image says of its inputs: `regions`, `boxes` of `CropJob`."""
        return {}


class WholePictures(Embedder):
    """A row an image: all of it."""

    level = Level.IMAGE

    def images_of(self, rows: np.ndarray) -> np.ndarray:
        return rows


class Crops(Embedder):
    """A row a box: the mean over the crops that a recipe makes of it."""

    def __init__(self, teacher: Teacher, pictures: Pictures, recipe: CropRecipe) -> None:
        super().__init__(teacher, pictures)
        self._recipe, self.crops = recipe, len(recipe.scales)

    def inputs(self) -> dict[str, Any]:
        return super().inputs() | {"crop": self._recipe.inputs()}

    def cuts(self, image: ImageBoxes, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"regions": self._recipe.regions(self.pictures.box[rows], image.width, image.height)}


class DenseBoxes(Embedder):
    """A row a box: its part of the feature map of the picture, squashed to `side` x `side` pixels (`teachers.dense`):
    `hdovd extract-clip --instance-teacher dense`.

    A batch has as many pictures as have the pixels of a batch of crops, one at the least, and all of their boxes.
    """

    teacher: ClipTeacher

    def __init__(self, teacher: Teacher, pictures: Pictures, side: int | None = None) -> None:
        """`side`: None for about DEFAULT_SIDES times that of the crop input. Raises HdovdError for a model that is no
        CLIP of open_clip's, or has no dense features.
        """
        from hdovd.pipelines.teachers.dense import DenseClip, near_side
        from hdovd.pipelines.teachers.openclip import ClipTeacher

        if not isinstance(teacher, ClipTeacher):
            raise HdovdError(f"--instance-teacher dense needs a CLIP of open_clip's, not a {type(teacher).__name__}")
        super().__init__(teacher, pictures)
        self._side = side or near_side(teacher.model.visual, DEFAULT_SIDES * max(teacher.input_size))
        self._clip = DenseClip(teacher.model.visual, self._side)
        self._transform = teacher.transform.squashed(self._side)
        self.fit, self.input_size = self._transform.fit, self._transform.size

    def inputs(self) -> dict[str, Any]:
        return {"preprocessing": self._transform.inputs(), "dense": self._clip.identity}

    def groups(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        starts = np.flatnonzero(np.diff(self.images_of(rows), prepend=-1))
        return np.split(rows, starts[:: self.places(size)][1:]) if len(rows) else []

    def places(self, size: int) -> int:
        height, width = self.teacher.input_size
        return max(1, round(size * height * width / self._side**2))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> np.ndarray:
        pixels, boxes = self._transform.normalise(batch.pixels.to(self.teacher.device, non_blocking=True)), batch.boxes

        def some(start: int, stop: int) -> np.ndarray:
            mine = [torch.from_numpy(box) for box in boxes[start:stop]]
            with self.teacher.autocast():
                return np.asarray(self._clip.embed_boxes(pixels[start:stop], mine).cpu())

        return self.teacher.in_memory(some, 0, len(pixels))

    def cuts(self, image: ImageBoxes, rows: np.ndarray) -> dict[str, np.ndarray]:
        from hdovd.pipelines.teachers.dense import scale_boxes

        boxes = torch.from_numpy(self.pictures.box[rows].astype(np.float32))
        return {"boxes": scale_boxes(boxes, image.width, image.height, self._side).numpy()}


def embedders_of(teacher: Teacher, pictures: Pictures, recipe: CropRecipe | DenseRecipe) -> dict[Level, Embedder]:
    """Those of the image and the instance level, as a recipe asks for them. Raises HdovdError for a dense recipe if the
    model has no dense features.
    """
    boxes = (
        Crops(teacher, pictures, recipe)
        if isinstance(recipe, CropRecipe)
        else DenseBoxes(teacher, pictures, recipe.side)
    )
    return {Level.IMAGE: WholePictures(teacher, pictures), Level.INSTANCE: boxes}


def mean_of(embeddings: np.ndarray, crops: int) -> np.ndarray:
    """(m, D) normalised embeddings -> (m // crops, D): the normalised mean of each row's crops."""
    if crops == 1:
        return embeddings
    mean = embeddings[: len(embeddings) // crops * crops].reshape(-1, crops, embeddings.shape[1]).mean(axis=1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


# --- who reads and cuts while the model computes ---


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


# Embeddings (m, D) float32 of a batch's rows and what filled it up; by image id why a picture could not be read, and
# the file of one that could.
Embedded = tuple[np.ndarray, dict[int, str], dict[int, PictureFile]]


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
        rows, problems, files = answer
        blank = np.repeat([job.image.id in problems for job in batch.jobs], [job.rows for job in batch.jobs])
        self.embedding[batch.rows - self.start] = np.where(blank[:, None], 0, rows[: len(batch.rows)])
        self.failed |= problems
        self.files |= files


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
        return embedders[level].encode(batch), batch.problems, batch.files

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
    try:
        fit = shutil.disk_usage(SHARED_MEMORY).free // (2 * wanted.size * 3 * math.prod(input_size))
    except OSError:
        return workers
    if fit < workers:
        log(
            f"--workers {workers}: {SHARED_MEMORY} has room for the batches of {fit} (docker run --shm-size 16g "
            f"gives it more)"
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


@dataclass(frozen=True, eq=False)
class _Batches(Dataset[tuple[Level, Batch]]):
    """A data set whose indices are descriptions of batches."""

    cutters: Mapping[Level, Cutter]

    def __getitem__(self, wanted: Wanted) -> tuple[Level, Batch]:
        return wanted.level, self.cutters[wanted.level].batch(wanted.jobs, wanted.size)
