"""From an image file to CLIP's input: the whole picture and a crop a box, through open_clip's own transform.

The crop recipe, part of the cache's identity: the box widened outwards to whole pixels, cut to the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.errors import HdovdError
from hdovd.pipelines.images import read_image

CROP = {"recipe": "box, widened outwards to whole pixels", "context_scale": 1.0}


def pixel_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The whole pixels that a box (xyxy, float) touches, at least one."""
    x0, y0 = min(math.floor(box[0]), width - 1), min(math.floor(box[1]), height - 1)
    return x0, y0, min(max(math.ceil(box[2]), x0 + 1), width), min(max(math.ceil(box[3]), y0 + 1), height)


@dataclass(frozen=True, slots=True)
class CropJob:
    """One image and its boxes (n, 4), xyxy pixels; None for the whole picture."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray | None


class CropDataset(Dataset[tuple[int, Tensor, str]]):
    """Item i is job i: its number, pixels (n, 3, s, s), and "" or what went wrong.

    A picture that cannot be read gives no pixels and a reason instead of an error: one bad file must not
    end the extraction of a hundred thousand.
    """

    def __init__(self, jobs: list[CropJob], transform: Callable[[Image.Image], Tensor]) -> None:
        self.jobs, self.transform = jobs, transform

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        job = self.jobs[index]
        try:
            image = read_image(job.path, job.width, job.height)
        except HdovdError as error:
            return index, torch.zeros(0), str(error)
        pictures = [image] if job.boxes is None else [image.crop(pixel_box(box, job.width, job.height)) for box in job.boxes.tolist()]
        return index, torch.stack([self.transform(p) for p in pictures]), ""
