"""What trains both proposal heads (HD-OVD, METHOD section 11).

Quality focal loss (arXiv 2006.04388) and GIoU, both towards quality = p * IoU^power. Main head: distinct candidates,
one to one with boxes (arXiv 2303.12776, section 3.3). Auxiliary head: every position, the best few of each box (TOOD,
arXiv 2108.07755, section 3.2). Released code: pictures without a box teach neither head. N pictures, A positions, M
candidates, H objects of a picture, padded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hdovd.config.detector import QueryProposalsConfig
from hdovd.modeling.adamixer.proposals import DensePredictions, positions
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.distributed import divisor
from hdovd.modeling.queries.overlaps import overlap
from hdovd.modeling.queries.pairs import NONE, Candidates

SMALL = 1e-7  # added to what a quality is divided by; released code. It is felt where p * IoU^6 is as small
LEAST_INSIDE = 0.01  # pixels between a positive position and each side of its box; released code


def quality_focal_rows(probability: Tensor, quality: Tensor, positive: Tensor) -> Tensor:
    """BCE(p, y) |y - p|^2 of positives, BCE(p, 0) p^2 of all others; any shape, float32."""
    with torch.autocast(probability.device.type, enabled=False):
        wanted = torch.where(positive, quality, 0.0)
        rows = torch.nn.functional.binary_cross_entropy(probability, wanted, reduction="none")
        return rows * (wanted - probability).abs() ** 2


def main_losses(
    found: Candidates, objects: Tensor, is_object: Tensor, paired: Tensor, config: QueryProposalsConfig
) -> tuple[Tensor, Tensor]:
    """Weighted class and box loss of the main head.

    Args:
        objects: (N, H, 4). is_object: (N, H) bool. paired: (N, H) int64, the candidate of each object or NONE.
    """
    is_paired = paired != NONE
    row = paired.clamp(min=0)
    boxes = found.boxes.gather(1, row[..., None].expand(-1, -1, 4))
    iou, giou = overlap(boxes, objects)
    aligned = found.probability.detach().gather(1, row) * iou.detach() ** config.iou_power
    quality = torch.where(is_paired, aligned / (aligned + SMALL) * iou.detach(), 0.0)
    counted = found.distinct & is_object.any(dim=1, keepdim=True)
    wanted = _scattered(found.probability, torch.where(is_paired, row, found.probability.shape[1]), quality)
    positive = (
        _scattered(found.probability, torch.where(is_paired, row, found.probability.shape[1]), is_paired.float()) > 0
    )
    rows = quality_focal_rows(found.probability, wanted, positive)
    count = divisor(quality.sum())
    return config.class_weight * (rows * counted).sum() / count, config.box_weight * (
        quality * (1 - giou)
    ).sum() / count


def auxiliary_losses(
    dense: DensePredictions,
    centres: Tensor,
    valid: Tensor,
    objects: Tensor,
    is_object: Tensor,
    config: QueryProposalsConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted class and box loss of the auxiliary head.

    Args:
        centres: (A, 2) x, y of the positions. valid: (N, A) bool, those that count.
        objects: (N, H, 4). is_object: (N, H) bool.
    """
    best, quality = aligned_positions(dense, centres, valid, objects, is_object, config)
    positions = dense.probability.shape[1]
    slot = torch.where(quality > NONE, best, positions).flatten(1)  # of a position that is no box's: one past the last
    wanted = _scattered(dense.probability, slot, quality.clamp(min=0).flatten(1))
    positive = _scattered(dense.probability, slot, (quality > NONE).float().flatten(1)) > 0
    counted = valid & is_object.any(dim=1, keepdim=True)
    rows = quality_focal_rows(dense.probability, wanted, positive)
    index = best.flatten(1)[..., None].expand(-1, -1, 4)
    _, giou = overlap(dense.boxes.gather(1, index).unflatten(1, best.shape[1:]), objects[:, None])
    weight = quality.clamp(min=0)
    count = divisor(weight.sum())
    return config.class_weight * (rows * counted).sum() / count, config.box_weight * (weight * (1 - giou)).sum() / count


@torch.no_grad()
def aligned_positions(
    dense: DensePredictions,
    centres: Tensor,
    valid: Tensor,
    objects: Tensor,
    is_object: Tensor,
    config: QueryProposalsConfig,
) -> tuple[Tensor, Tensor]:
    """The positions of each object that are best aligned with it, at most k, and the quality that they are to say.

    A position counts if p * IoU^power is over zero, and if it lies within the object; one that several objects want is
    the one's of the highest IoU. The quality is that measure, scaled so that an object's best position has its highest
    IoU.

    Returns:
        (N, k, H) int64 positions, (N, k, H) qualities, NONE for a position that does not count.
    """
    iou, _ = overlap(dense.boxes[:, :, None], objects[:, None])
    measure = dense.probability[..., None] * iou**config.iou_power
    measure = torch.where(valid[..., None] & is_object[:, None], measure, 0.0)
    strength, best = measure.topk(min(config.aux_positives, measure.shape[1]), dim=1)
    place = centres[best]
    inside = (
        torch.cat([place - objects[:, None, :, :2], objects[:, None, :, 2:] - place], dim=-1).amin(dim=-1)
        > LEAST_INSIDE
    )
    wants = inside & (strength > 0)
    own = iou.gather(1, best)
    owner = torch.full_like(iou, NONE).scatter(1, best, torch.where(wants, own, NONE)).argmax(dim=2)
    wins = wants & (owner.gather(1, best.flatten(1)).view_as(best) == torch.arange(iou.shape[2], device=iou.device))
    strength, own = strength * wins, own * wins
    quality = strength / (strength.amax(dim=1, keepdim=True) + SMALL) * own.amax(dim=1, keepdim=True)
    return best, torch.where(wins, quality, NONE)


def valid_positions(shapes: Sequence[torch.Size], strides: Sequence[int], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The centres (A, 2) x, y of all positions of levels of these shapes, and which count for each picture, (N, A)
    bool.

    Those within the picture as it would be padded alone, of levels whose stride is not longer than its shorter side
    (released code).

    Args:
        sizes: (N, 2) height, width of the pictures.
    """
    centres = torch.cat([positions(shape, stride, sizes.device) for shape, stride in zip(shapes, strides, strict=True)])
    counts = [h * w for h, w in shapes]
    stride = torch.cat([sizes.new_full((count,), stride) for count, stride in zip(counts, strides, strict=True)])
    alone = (sizes / SIZE_DIVISOR).ceil().flip(-1) * SIZE_DIVISOR
    within = (centres - stride[:, None] / 2 < alone[:, None]).all(dim=-1)
    return centres, within & (stride < sizes.amin(dim=1, keepdim=True) + 1)


def _scattered(like: Tensor, slot: Tensor, values: Tensor) -> Tensor:
    """Zeros (N, X) like `like`, with values (N, n) at slots (N, n); slot X is nowhere."""
    rows = like.new_zeros(len(like), like.shape[1] + 1)
    return rows.scatter_reduce(1, slot, values.to(rows), "amax")[:, :-1]
