"""Proposals: train a class-agnostic proposal network on base boxes alone, then propose boxes on training images.

Called by `hdovd propose`, `hdovd demo` and Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_iou, nms

from hdovd.coco import DataPaths, Split
from hdovd.config import Recipe
from hdovd.errors import HdovdError
from hdovd.pipelines.device import pick_device, training_workers
from hdovd.pipelines.draws import Draw, is_flipped, key_of
from hdovd.pipelines.fit import Hooks, Loop, shuffled
from hdovd.pipelines.images import read_pixels
from hdovd.pipelines.loading import Batches
from hdovd.pipelines.progress import progress
from hdovd.pipelines.proposal_file import Proposals, ProposalTable, write_proposals
from hdovd.proposer import ProposalNetwork
from hdovd.protocol import load_protocol
from hdovd.targets import flip_boxes


@dataclass(frozen=True, slots=True)
class ProposeJob:
    """`top` proposals an image at most, of `min_score` or more, both sides at least `min_side` pixels of the original image.

    A proposal that overlaps a base box or a better proposal by an IoU of more than `overlap` is left out.
    `backbone_out`: where to keep the trained backbone, a start for detectors where ImageNet weights do not fit.
    """

    data: DataPaths
    out: Path
    recipe: Recipe
    protocol: str = "ov-coco"
    top: int = 10
    overlap: float = 0.5
    min_side: float = 8.0
    min_score: float = 0.0
    device: str = "auto"
    backbone_out: Path | None = None


class _Pictures(Dataset[tuple[Tensor, Tensor, int]]):
    """A picture (3, h, w) uint8, its base boxes (n, 4) and its id, by number; or by draw, and then flipped as its key says."""

    def __init__(self, split: Split, recipe: Recipe) -> None:
        self.split, self.recipe = split, recipe

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, wanted: int | Draw) -> tuple[Tensor, Tensor, int]:
        image = self.split.images[wanted.index if isinstance(wanted, Draw) else wanted]
        pixels, boxes = read_pixels(self.split, image), torch.from_numpy(image.boxes)
        if isinstance(wanted, Draw) and is_flipped(key_of(self.recipe.train.seed, wanted.epoch, image.id), self.recipe.input.flip):
            pixels, boxes = pixels.flip(-1), flip_boxes(boxes, image.width)
        return pixels, boxes, image.id


def propose(job: ProposeJob, log: Callable[[str], None] = print) -> dict[int, Proposals]:
    """Train, propose, write `job.out` and return the proposals by image id. Raises HdovdError for bad input."""
    recipe, device = job.recipe, pick_device(job.device)
    split = job.data.load("train2017", load_protocol(job.protocol), base_only=True, log=log)
    torch.manual_seed(recipe.train.seed)
    network = ProposalNetwork(recipe, log).to(device)

    def losses_of(samples: list[tuple[Tensor, Tensor, int]], _: int) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = network([p.to(device) for p, _, _ in samples], [b.to(device) for _, b, _ in samples])
        return losses

    unreadable: dict[str, None] = {}  # in the order met; extraction lists them too

    def leave_out(error: HdovdError) -> None:
        unreadable[str(error)] = None

    batches = shuffled(_Pictures(split, recipe), recipe.train, device, leave_out)
    Loop(network, losses_of, batches, recipe.train, device, "proposals", lambda sample: sample[2]).run(Hooks())
    if job.backbone_out is not None:
        job.backbone_out.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in network.backbone.body.state_dict().items()}, job.backbone_out)
        log(f"wrote {job.backbone_out}: the backbone, for --set detector.backbone.weights=")
    found = _propose(network.eval(), split, job, device, leave_out)
    for problem in unreadable:
        log(f"skipped: {problem}")
    if not found:
        raise HdovdError(f"no training picture of {split.folder} can be read; first reason: {next(iter(unreadable))}")
    count = write_proposals(job.out, found)
    log(f"wrote {job.out}: {count} proposals for {len(found)} images, {count / len(found):.1f} an image, identity "
        + ProposalTable.of(found).identity())
    return found


def _propose(network: ProposalNetwork, split: Split, job: ProposeJob, device: torch.device,
             leave_out: Callable[[HdovdError], None]) -> dict[int, Proposals]:
    base = {image.id: torch.from_numpy(image.boxes) for image in split.images}
    workers = training_workers(device, job.recipe.train.workers)
    batches = Batches(_Pictures(split, job.recipe), job.recipe.train.batch_size, workers, device=device, on_error=leave_out)
    found = {}
    for samples in progress(batches, "propose", "batch", len(batches)):
        for (boxes, scores), (_, _, image_id) in zip(network.propose([p.to(device) for p, _, _ in samples]), samples, strict=True):
            keep = select_proposals(boxes.cpu(), scores.cpu(), base[image_id], job)
            found[image_id] = Proposals(boxes.cpu()[keep].numpy(), scores.cpu()[keep].numpy())
    return found


def select_proposals(boxes: Tensor, scores: Tensor, base: Tensor, job: ProposeJob) -> Tensor:
    """Rows to keep of an image's proposals, best first: those that overlap a base box go, then NMS.

    Args:
        boxes: (n, 4), scores: (n,), base: (b, 4); xyxy pixels of the original image.
    """
    usable = ((boxes[:, 2:] - boxes[:, :2]) >= job.min_side).all(dim=1) & (scores >= job.min_score)
    usable &= (box_iou(boxes, base) <= job.overlap).all(dim=1)
    rows = usable.nonzero().flatten()
    return rows[nms(boxes[rows], scores[rows], job.overlap)][: job.top]
