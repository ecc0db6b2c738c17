"""How rows of a level become embeddings: what to read and cut for them, in which batches, and what the model makes of
those.

Whole pictures and crops are here; boxes of one pass over a picture are in `dense`. Rows are counted from the
level's first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.schema import Level
from hdovd.data.coco import Exif, ImageBoxes
from hdovd.pipelines.embedding.crop_recipe import CropRecipe
from hdovd.pipelines.embedding.crops import Batch, CropJob, Cutter, Picture, read_picture
from hdovd.pipelines.teachers.base import Teacher


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
            jobs.append(
                CropJob(
                    image.id,
                    self.pictures.path(image),
                    image.width,
                    image.height,
                    len(mine),
                    place,
                    exif=self.pictures.exif,
                    **self.cuts(image, mine),
                )
            )
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


def mean_of(embeddings: np.ndarray, crops: int) -> np.ndarray:
    """(m, D) normalised embeddings -> (m // crops, D): the normalised mean of each row's crops."""
    if crops == 1:
        return embeddings
    mean = embeddings[: len(embeddings) // crops * crops].reshape(-1, crops, embeddings.shape[1]).mean(axis=1)
    normalised: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return normalised
