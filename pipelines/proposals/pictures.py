"""The pictures and boxes of a split as the proposal networks see them, and what the networks find in them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Split
from hdovd.data.targets import flip_boxes
from hdovd.modeling.proposals.base import ProposalNetwork
from hdovd.pipelines.common.device import Team, training_workers
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.precision import inference_autocast
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.dataloading.sample_keys import Draw, is_flipped, key_of


class Picture(NamedTuple):
    """pixels (3, h, w) uint8, boxes (n, 4) xyxy. `problem`: why the picture cannot be read; it is black then, and has
    no boxes.
    """

    pixels: Tensor
    boxes: Tensor
    image_id: int
    problem: str


class Pictures(Dataset[Picture]):
    """A picture by number; or by draw, and then flipped as its key says.

    One that cannot be read is there all the same, without anything in it: every process has its part of every batch, so
    that a run over several of them does not wait for one which has nothing to do.
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
            return Picture(
                torch.zeros(3, image.height, image.width, dtype=torch.uint8), torch.zeros(0, 4), image.id, str(error)
            )
        if isinstance(wanted, Draw) and is_flipped(
            key_of(self.recipe.train.seed, wanted.epoch, image.id), self.recipe.input.flip
        ):
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


def found_in(
    pictures: Pictures, network: ProposalNetwork, us: Team, what: str
) -> Iterator[tuple[Picture, Tensor, Tensor]]:
    """Each picture in order, with the boxes (n, 4) and scores (n,) that a network proposes in it, on the CPU.

    `what`: the name of the progress bar.
    """
    config = pictures.recipe.train
    batches = Batches(pictures, config.batch_size, training_workers(us.device, config.workers), device=us.device)
    for batch in progress(batches, what, "batch", len(batches) if us.leads else 0):
        with inference_autocast(us.device, network.recipe):
            scored = network.propose([picture.pixels.to(us.device) for picture in batch])
        for picture, (boxes, scores) in zip(batch, scored, strict=True):
            yield picture, boxes.cpu(), scores.cpu()
