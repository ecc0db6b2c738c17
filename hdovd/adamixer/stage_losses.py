"""What a stage's queries learn from the boxes that they are paired with: class, objectness, box (HD-OVD, METHOD section 11).

Over all stages at once; sums over stages, divided by the base boxes of the batch. Called by `model`.
S stages, N pictures, Q queries, G boxes of the batch, T boxes of a picture, padded (`boxes_of_step`), X prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from hdovd.adamixer.boxes import overlap
from hdovd.adamixer.boxes_of_step import StepBoxes
from hdovd.adamixer.config import StageLossConfig


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which query is which box's. query (S, G) int64 in 0..N Q - 1, anything where there is none; found (S, G) bool, whether there is.

    iou (S, N, Q, T) of all queries' boxes with all boxes of their picture; own_iou (S, G) of each box with its query's.
    """

    query: Tensor
    found: Tensor
    iou: Tensor
    own_iou: Tensor

    @classmethod
    def of(cls, query: Tensor, iou: Tensor, boxes: StepBoxes) -> Pairs:
        """`query`: (S, G) int64, negative for none."""
        found, query = query >= 0, query.clamp(min=0)
        return cls(query, found, iou, iou.flatten(1).gather(1, query * iou.shape[3] + boxes.column))

    def of_boxes(self, rows: Tensor) -> Tensor:
        """What the query of each box has: (S, N, Q, X) -> (S, G, X)."""
        return rows.flatten(1, 2).gather(1, self.query[..., None].expand(*self.query.shape, rows.shape[-1]))

    def to_queries(self, values: Tensor, nothing: float) -> Tensor:
        """What each query is given by its box: values (G,) or (S, G) -> (S, N, Q), `nothing` to a query without a box."""
        shape = self.iou.shape[:3]
        slots = shape[1] * shape[2]
        given = values.new_full((shape[0], slots + 1), nothing)
        slot = torch.where(self.found, self.query, slots)  # one past the last is nobody's
        return given.scatter(1, slot, values.expand_as(slot))[:, :slots].view(shape)


def query_weights(pairs: Pairs, boxes: StepBoxes, config: StageLossConfig) -> Tensor:
    """Weights (S, N, Q) of the queries in the classification loss.

    That of its box, but 0 if the two overlap too little. Without a box a constant, but 0 if it lies on a box that is another's.
    """
    given = pairs.to_queries(torch.where(pairs.own_iou < config.poor_iou, 0.0, boxes.weights), -1.0)
    taken = torch.zeros(pairs.iou.shape[0], *boxes.padded.shape[:2], dtype=torch.bool, device=given.device)
    taken[:, boxes.picture, boxes.column] = pairs.found
    near = ((pairs.iou > config.near_iou) & taken[:, :, None]).any(dim=-1)
    return torch.where(given >= 0, given, torch.where(near, 0.0, config.unmatched_weight))


def classification_loss(logits: Tensor, labels: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Weighted cross-entropy of logits (S, N, Q, X) and labels (S, N, Q): the sum, divided by `count` ()."""
    rows = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
    return (rows * weights.flatten()).sum() / count


def objectness_loss(logits: Tensor, is_object: Tensor, count: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002; alpha 0.25, gamma 2) of logits (S, N, Q): the sum, divided by `count` ()."""
    loss: Tensor = sigmoid_focal_loss(logits, is_object.to(logits), alpha=0.25, gamma=2, reduction="sum") / count
    return loss


def box_losses(predicted: Tensor, pairs: Pairs, boxes: StepBoxes, count: Tensor) -> tuple[Tensor, Tensor]:
    """L1 in sides of the picture, and 1 - GIoU, of boxes (S, N, Q, 4) with the base boxes that they are paired with; sums over `count`."""
    own = pairs.of_boxes(predicted)
    counted = pairs.found & boxes.is_base
    sides = boxes.sizes.flip(-1).repeat(1, 2)[boxes.picture]
    far = ((own - boxes.boxes).abs() / sides).sum(dim=-1)
    _, giou = overlap(own, boxes.boxes)
    return (far * counted).sum() / count, ((1 - giou) * counted).sum() / count
