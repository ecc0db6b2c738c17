"""From an image file to CLIP's input: reading pictures and cutting out the regions that `crop_recipe` gives."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdovd.cache.picture_files import PictureFile
from hdovd.core.errors import HdovdError
from hdovd.core.picture_header import told
from hdovd.data.coco import Exif
from hdovd.pipelines.common.images import read_annotated

NO_FILE = PictureFile(b"", b"", 0, 0)  # of a picture in memory


def cut(picture: Tensor, region: Sequence[int]) -> Tensor:
    """The pixels of a region xyxy of (3, h, w); black outside the picture. A view where it can be."""
    (x0, y0, x1, y1), (height, width) = region, picture.shape[-2:]
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        return picture[:, y0:y1, x0:x1]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    pixels = picture.new_zeros(3, y1 - y0, x1 - x0)
    if left < right and top < bottom:
        pixels[:, top - y0 : bottom - y0, left - x0 : right - x0] = picture[:, top:bottom, left:right]
    return pixels


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
    pixels = torch.from_numpy(np.array(found)).permute(2, 0, 1)
    return Picture(pixels, PictureFile.of(path, stat, data, either=either))


@dataclass(frozen=True, slots=True)
class CropJob:
    """One image, for `rows` rows of a level. `regions` (n, 4): what to cut out, xyxy pixels; None for the whole
    picture.

    `boxes` (rows, 4) float32: what the model is to look at, xyxy pixels of its input. `place`: of the first input in
    its batch.
    """

    image_id: int
    path: Path
    width: int
    height: int
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

    def pin_memory(self) -> "Batch":
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
        pixels = torch.zeros(count, *self.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        batch = Batch(pixels, {}, [np.zeros((0, 4), np.float32)] * count)
        for job in jobs:
            if job.boxes is not None:
                batch.boxes[job.place] = job.boxes
            try:
                picture = self.read(job)
            except HdovdError as error:
                batch.problems[job.image_id] = str(error)
                continue
            batch.files[job.image_id] = picture.file
            for place, crop in enumerate(self.crops(picture.pixels, job), job.place):
                batch.pixels[place] = crop
        return batch

    def read(self, job: CropJob) -> Picture:
        """Raises HdovdError."""
        return self.picture(job.path, job.width, job.height, job.exif)

    def crops(self, picture: Tensor, job: CropJob) -> Iterator[Tensor]:
        """(3, *size) uint8, one a region."""
        if job.regions is None:
            yield self.fit(picture)
        else:
            yield from (self.fit(cut(picture, region)) for region in job.regions.tolist())
