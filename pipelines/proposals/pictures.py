"""The pictures and boxes of a split as the proposal networks see them. Called by `proposer_training`, `propose` and `proposal_recall`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Split
from hdovd.data.targets import flip_boxes
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.dataloading.sample_keys import Draw, is_flipped, key_of


class Picture(NamedTuple):
    """pixels (3, h, w) uint8, boxes (n, 4) xyxy. `problem`: why the picture cannot be read; it is black then, and has no boxes."""

    pixels: Tensor
    boxes: Tensor
    image_id: int
    problem: str


class Pictures(Dataset[Picture]):
    """A picture by number; or by draw, and then flipped as its key says.

    One that cannot be read is there all the same, without anything in it: every process has its part of every batch, so that a run
    over several of them does not wait for one which has nothing to do.
    """

    def __init__(self, split: Split, recipe: Recipe, numbers: list[int] | None = None) -> None:
        """`numbers`: those of the split's images that are wanted, in order; None: all."""
        self.split, self.recipe = split, recipe
        self.numbers = list(range(len(split.images))) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, wanted: int | Draw) -> Picture:
        image = self.split.images[self.numbers[wanted.index if isinstance(wanted, Draw) else wanted]]
        try:
            pixels, boxes = read_pixels(self.split, image), torch.from_numpy(image.boxes)
        except HdovdError as error:
            return Picture(torch.zeros(3, image.height, image.width, dtype=torch.uint8), torch.zeros(0, 4), image.id, str(error))
        if isinstance(wanted, Draw) and is_flipped(key_of(self.recipe.train.seed, wanted.epoch, image.id), self.recipe.input.flip):
            pixels, boxes = pixels.flip(-1), flip_boxes(boxes, image.width)
        return Picture(pixels, boxes, image.id, "")


def require_readable(split: Split) -> None:
    """Raises HdovdError if no picture of a split can be read, with the first one's reason."""
    first = ""
    for image in split.images:
        try:
            read_pixels(split, image)
        except HdovdError as error:
            first = first or str(error)
        else:
            return
    raise HdovdError(f"no training picture of {split.folder} can be read; first reason: {first}")
