"""From the class features of queries to scores for any classes; and what trains queries, over all stages at once:
class, objectness, box (HD-OVD, METHOD section 11).

Losses are sums over stages, divided by the base boxes of the batch. S stages, N pictures, Q queries, G boxes of the
batch, T boxes of a picture, padded (`pairs`), X prompts, K classes, D embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from hdovd.config.detector import StageLossConfig
from hdovd.modeling.boxes import overlap
from hdovd.modeling.distributed import counts_of_ranks, gather_rows, rank
from hdovd.modeling.queries.pairs import Pairs, StepBoxes


class TextAdapters(nn.Module):
    """`classified` is what the classifier compares with its prompts; `distilled` what the losses in text space are
    about.

    The second one's weights are made of the last ones of the first, which learn nothing by it. It starts as the
    identity.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.visual_to_text = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.transfer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for start in self.transfer[-1].parameters():
            nn.init.zeros_(start)

    def classified(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        moved: Tensor = self.visual_to_text(c)
        return c + moved.float()

    def distilled(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        last = self.visual_to_text[-1]
        assert isinstance(last, nn.Linear)
        with torch.autocast(c.device.type, enabled=False):
            moved: Tensor = c @ self.transfer(last.weight.detach()).T
            return c + moved


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
