"""What trains RT-DETR beside what all queries have: IoU-aware objectness, of stages, candidates and denoising.

N pictures, Q queries, M candidates, H objects of a picture, padded.
"""

import torch
from torch import Tensor

from hdovd.modeling.queries.overlaps import overlap
from hdovd.modeling.queries.pairs import NONE, Candidates, StepBoxes

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
