"""What trains queries: the losses of the stages (class, objectness, box) and of both proposal heads (HD-OVD, METHOD
section 11).

Stages: over all at once; sums over stages, divided by the base boxes of the batch. Proposal heads: quality focal loss
(arXiv 2006.04388) and GIoU, both towards quality = p * IoU^power. Main head: distinct candidates, one to one with boxes
(arXiv 2303.12776, section 3.3). Auxiliary head: every position, the best few of each box (TOOD, arXiv 2108.07755,
section 3.2). Released code: pictures without a box teach neither head. S stages, N pictures, Q queries, G boxes of the
batch, T boxes of a picture, padded (`pairs`), X prompts, A positions, M candidates, H objects of a picture, padded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from hdovd.config.adamixer import QueryProposalsConfig, StageLossConfig
from hdovd.modeling.adamixer.boxes import overlap
from hdovd.modeling.adamixer.pairs import NONE, Pairs, StepBoxes
from hdovd.modeling.adamixer.proposals import Candidates, DensePredictions, positions
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.distributed import counts_of_ranks, divisor, gather_rows, rank


def query_weights(pairs: Pairs, boxes: StepBoxes, config: StageLossConfig) -> Tensor:
    """Weights (S, N, Q) of the queries in the classification loss.

    That of its box, but 0 if the two overlap too little. Without a box a constant, but 0 if it lies on a box that is
    another's.
    """
    given = pairs.to_queries(torch.where(pairs.own_iou < config.poor_iou, 0.0, boxes.weights), -1.0)
    taken = torch.zeros(pairs.iou.shape[0], *boxes.padded.shape[:2], dtype=torch.bool, device=given.device)
    taken[:, boxes.picture, boxes.column] = pairs.found
    near = ((pairs.iou > config.near_iou) & taken[:, :, None]).any(dim=-1)
    return torch.where(given >= 0, given, torch.where(near, 0.0, config.unmatched_weight))


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Weighted cross-entropy of logits (S N Q, X) and labels (S, N, Q): the sum, divided by `count` ()."""
    rows = F.cross_entropy(logits, labels.flatten(), reduction="none")
    return (rows * weights.flatten()).sum() / count


def objectness_loss(logits: Tensor, is_object: Tensor, count: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002; alpha 0.25, gamma 2) of logits (S, N, Q): the sum, divided by `count` ()."""
    loss: Tensor = sigmoid_focal_loss(logits, is_object.to(logits), alpha=0.25, gamma=2, reduction="sum") / count
    return loss


def box_losses(predicted: Tensor, pairs: Pairs, boxes: StepBoxes, count: Tensor) -> tuple[Tensor, Tensor]:
    """L1 in sides of the picture, and 1 - GIoU, of boxes (S, N, Q, 4) with the base boxes that they are paired with;
    sums over `count`.
    """
    own = pairs.of_boxes(predicted)
    counted = pairs.found & boxes.is_base
    sides = boxes.sizes.flip(-1).repeat(1, 2)[boxes.picture]
    far = ((own - boxes.boxes).abs() / sides).sum(dim=-1)
    _, giou = overlap(own, boxes.boxes)
    return (far * counted).sum() / count, ((1 - giou) * counted).sum() / count


def prompts_and_labels(
    boxes: StepBoxes, texts: Tensor, backgrounds: Tensor, *, with_pseudo: bool
) -> tuple[Tensor, Tensor]:
    """The classifier's prompts (X, D), and which of them the query of each box should be found by, (G,) int64.

    Prompts are [t_1..t_K; u of the pseudo boxes of all processes; bg], the last of B + 1 rows. The paper writes a
    picture's own u first: a softmax does not see the order of its columns. Without pseudo boxes among them, those are
    to be found by bg (and weigh nothing).

    Args:
        texts: (K, D). backgrounds: (B + 1, D).
    """
    first = len(texts)
    parts = [texts.to(backgrounds)]
    place = torch.full_like(boxes.labels, first)  # of bg
    if with_pseudo:
        own = torch.cat([t.pseudo_texts for t in boxes.targets]).to(backgrounds)
        counts = counts_of_ranks(len(own), own.device)
        parts.append(gather_rows(own, counts))
        first += sum(counts[: rank()])
        place = first + (~boxes.is_base).cumsum(0) - 1
    return torch.cat([*parts, backgrounds]), torch.where(boxes.is_base, boxes.labels, place)


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
