"""What trains RT-DETR beside what all queries have: IoU-aware objectness of stages and candidates, and contrastive
denoising (arXiv 2203.03605, section 3.3), queries that start from boxes with noise and are to find them.

A group of denoising holds each box of the picture twice: near it, and so far away that there is no object to be found.
What a query knows of its box's class is the class's text, of a pseudo box its u: a linear layer makes its content of
that. A picture has as many groups as `queries` allow, at least one; the losses are means over its groups, so that they
do not depend on the rest of the batch. Neither other groups nor the chosen queries see a group.

N pictures, Q chosen queries, M candidates, or slots of the denoising, and H objects of a picture, padded; G boxes of
the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hdovd.config.detector import DenoisingConfig
from hdovd.modeling.batching import Use, image_generator
from hdovd.modeling.boxes import overlap
from hdovd.modeling.queries.detector import Step
from hdovd.modeling.queries.pairs import NONE, Candidates, StepBoxes
from hdovd.modeling.rtdetr.decoder import to_shares

ALPHA, GAMMA = 0.75, 2.0  # arXiv 2008.13367, section 4.1
TINY = 1e-7  # of a probability, before its logarithm is taken


def varifocal_rows(probability: Tensor, quality: Tensor) -> Tensor:
    """Varifocal loss (arXiv 2008.13367): q BCE(p, q) where there is an object of quality q, else alpha p^gamma BCE(p,
    0); any shape, float32.
    """
    weight = torch.where(quality > 0, quality, ALPHA * probability.detach() ** GAMMA)
    sure = probability.clamp(TINY, 1 - TINY)  # torch's own function stops at what is no number, before training says it
    return -weight * (quality * sure.log() + (1 - quality) * (1 - sure).log())


def box_rows(found: Tensor, wanted: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 in sides of the picture, 1 - GIoU, and IoU of boxes (..., 4) xyxy with sizes (..., 2) of their pictures."""
    iou, giou = overlap(found, wanted)
    return ((found - wanted).abs() / sizes.flip(-1).tile(2)).sum(dim=-1), 1 - giou, iou


def candidate_losses(found: Candidates, boxes: StepBoxes, paired: Tensor, count: Tensor) -> list[Tensor]:
    """Varifocal loss, L1 and GIoU loss of candidates, one to one with objects; sums over `count`.

    Args:
        paired: (N, H) int64, the candidate of each object or NONE.
    """
    is_paired, row = paired != NONE, paired.clamp(min=0)
    own = found.boxes.gather(1, row[..., None].expand(-1, -1, 4))
    far, apart, iou = box_rows(own, boxes.objects, boxes.sizes[:, None])
    slots = found.probability.shape[1]
    quality = found.probability.new_zeros(len(row), slots + 1)  # one past the last is nobody's
    quality = quality.scatter(1, torch.where(is_paired, row, slots), iou.detach().clamp(min=0))[:, :slots]
    rows = varifocal_rows(found.probability, quality) * found.distinct
    return [rows.sum() / count, (far * is_paired).sum() / count, (apart * is_paired).sum() / count]


# --- denoising ---

CHOSEN, NOBODY = -1, -2  # groups: of the chosen queries, of slots that hold no box


@dataclass(frozen=True, slots=True)
class Noised:
    """box (N, M) int64: the box of each slot in 0..G-1, 0 where there is none. positive (N, M) bool: near its box.
    group (N, M) int64. share (N, M): 1 by the groups of the picture, 0 where there is none.
    boxes (N, M, 4): centre and sides, in sides of the picture. prompt (N, M) int64: which text the content is made of.
    """

    box: Tensor
    positive: Tensor
    group: Tensor
    share: Tensor
    boxes: Tensor
    prompt: Tensor

    @property
    def real(self) -> Tensor:
        """(N, M) bool: slots with a box."""
        return self.group != NOBODY

    def seen(self, queries: int) -> Tensor:
        """(N, Q + M, Q + M) bool: who looks at whom, chosen queries first."""
        group = torch.nn.functional.pad(self.group, (queries, 0), value=CHOSEN)
        return (group[:, :, None] == group[:, None]) | (group[:, None] == CHOSEN)


def noised(step: Step, config: DenoisingConfig) -> Noised | None:
    """The slots of a step, drawn by each picture's key; None if there is no box."""
    boxes, classes = step.boxes, step.classes
    if not len(boxes.boxes):
        return None
    numbers, draws = _layout(boxes, step.keys, config.queries, boxes.boxes.device)
    box, group, negative, groups = numbers.unbind(-1)
    sizes = boxes.sizes[:, None].expand(*box.shape, 2)
    own = boxes.boxes[box]
    half = (own[..., 2:] - own[..., :2]).tile(2) / 2
    away = 2 * draws[..., :4] - 1
    far = away + torch.where(away < 0, -1.0, 1.0) * negative[..., None]
    moved = torch.minimum((own + far * half * config.box_noise).clamp(min=0), sizes.flip(-1).tile(2))
    corners = moved.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(-2)
    other = (draws[..., 5] * classes).long().clamp(max=classes - 1)
    prompt = torch.where(draws[..., 4] < config.label_noise, other, step.labels[box])
    real = group != NOBODY
    return Noised(box, real & (negative == 0), group, real / groups.clamp(min=1), to_shares(corners, sizes), prompt)


def _layout(boxes: StepBoxes, keys: Sequence[int | None], queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, M, 4) int64, box, group, whether too far, and the picture's groups; (N, M, 6) draws in 0..1. Made on the
    host, with one transfer each."""
    numbers, draws, first = [], [], 0
    for key, count in zip(keys, map(sum, zip(boxes.base, boxes.pseudo, strict=True)), strict=True):
        groups = max(queries // max(count, 1), 1)
        of_group, negative, box = torch.meshgrid(
            torch.arange(groups), torch.arange(2), torch.arange(first, first + count), indexing="ij"
        )
        rows = torch.stack([box, of_group, negative, torch.full_like(box, groups)], dim=-1).flatten(0, 2)
        numbers.append(rows)
        draws.append(torch.rand(len(rows), 6, generator=image_generator(key, Use.NOISE)))
        first += count
    padded = pad_sequence(numbers, batch_first=True)
    lengths = torch.tensor([len(rows) for rows in numbers])
    padded[..., 1].masked_fill_(torch.arange(padded.shape[1]) >= lengths[:, None], NOBODY)
    return padded.to(device, non_blocking=True), pad_sequence(draws, batch_first=True).to(device, non_blocking=True)
