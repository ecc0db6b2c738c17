"""How rows of a level become embeddings: what to read and cut for them, in which batches, and what the model makes of
those.

Rows are counted from the level's first. open_clip is imported for dense boxes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Exif, ImageBoxes
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, DenseRecipe
from hdovd.pipelines.embedding.crops import Batch, CropJob, Cutter, Picture, read_picture
from hdovd.pipelines.teachers.base import Teacher

if TYPE_CHECKING:
    from hdovd.pipelines.teachers.openclip import ClipTeacher

DEFAULT_SIDES = 3  # of a dense teacher, of the crop input: 672 pixels where that has 224


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
            with self.teacher.autocast():
                return (
                    self._clip.embed_boxes(pixels[start:stop], [torch.from_numpy(box) for box in boxes[start:stop]])
                    .cpu()
                    .numpy()
                )

        return self.teacher.in_memory(some, 0, len(pixels))

    def cuts(self, image: ImageBoxes, rows: np.ndarray) -> dict[str, np.ndarray]:
        from hdovd.pipelines.teachers.dense import scale_boxes

        boxes = torch.from_numpy(self.pictures.box[rows].astype(np.float32))
        return {"boxes": scale_boxes(boxes, image.width, image.height, self._side).numpy()}


def embedders_of(teacher: Teacher, pictures: Pictures, recipe: CropRecipe | DenseRecipe) -> dict[Level, Embedder]:
    """Those of the image and the instance level, as a recipe asks for them. Raises HdovdError for a dense recipe if the
    model has no dense features.
    """
    boxes: Embedder = (
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
    normalised: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return normalised
