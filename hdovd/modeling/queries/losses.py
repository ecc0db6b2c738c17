"""What trains queries, over all stages at once: objectness, boxes, weights of the classification (HD-OVD, METHOD
section 11); and what distils: level 1's losses in visual space (section 4) and level 2's in text space (sections 5 and
11).

Losses are sums over stages. S stages, N pictures, Q queries, G boxes of the batch, T boxes of a picture, padded
(`pairs`), K base classes, n pairs of a stage, b base and p pseudo boxes with a query, of one stage and all processes, D
embedding size.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from hdovd.config.detector import StageLossConfig, TextLevelConfig
from hdovd.config.recipe import InstanceLossConfig
from hdovd.core import HdovdError
from hdovd.modeling.boxes import overlap
from hdovd.modeling.distributed import FeatureQueue, gather_rows
from hdovd.modeling.levels.instance import pair_losses
from hdovd.modeling.losses.instance import relation_loss
from hdovd.modeling.queries.pairs import Pairs, StepBoxes


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


def objectness_loss(logits: Tensor, is_object: Tensor, count: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002; alpha 0.25, gamma 2) of logits (S, N, Q): the sum, divided by `count` ()."""
    return cast(Tensor, sigmoid_focal_loss(logits, is_object.to(logits), alpha=0.25, gamma=2, reduction="sum") / count)


def box_losses(predicted: Tensor, pairs: Pairs, boxes: StepBoxes, count: Tensor) -> tuple[Tensor, Tensor]:
    """L1 in sides of the picture, and 1 - GIoU, of boxes (S, N, Q, 4) with the base boxes that they are paired with;
    sums over `count`.
    """
    own, counted = pairs.of_boxes(predicted), pairs.found & boxes.is_base
    far = ((own - boxes.boxes).abs() / boxes.sizes.flip(-1).tile(2)[boxes.picture]).sum(dim=-1)
    _, giou = overlap(own, boxes.boxes)
    return (far * counted).sum() / count, ((1 - giou) * counted).sum() / count


# --- what distils ---


class InstanceLevels(nn.Module):
    """Pairs are those of all processes: every process pushes the same rows into its memories, which are in the
    checkpoint.

    (The released code's are of one process each, and lost with it.)
    """

    def __init__(self, config: InstanceLossConfig, stages: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.student_queues = nn.ModuleList(FeatureQueue(config.queue, dim) for _ in range(stages))
        self.teacher_queues = nn.ModuleList(FeatureQueue(config.queue, dim) for _ in range(stages))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> dict[str, Tensor]:
        """`students`, `teachers`: (n, D) L2-normalised q and e of each stage. The losses are summed over stages."""
        stages = zip(students, teachers, self.student_queues, self.teacher_queues, strict=True)
        losses = [pair_losses(q, e, cast(FeatureQueue, s), cast(FeatureQueue, t), self.config) for q, e, s, t in stages]
        aligned, related = map(torch.stack, zip(*losses, strict=True))
        return {
            "instance_alignment": self.config.alignment_weight * aligned.sum(),
            "instance_relation": self.config.relation_weight * related.sum(),
        }


MIN_CLASSES = 2  # with fewer in a batch there is nothing to relate


class TextLevel(nn.Module):
    """Keeps a moving mean of every base class's centroid at every stage, for steps in which the class is absent.

    The means start as the classes' own texts, so their number is known from the first step on. They are in the
    checkpoint.
    """

    def __init__(self, config: TextLevelConfig, stages: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.centroids: Tensor  # (S, K, D), not normalised; no rows before the first step
        self.updates: Tensor
        self.register_buffer("centroids", torch.zeros(stages, 0, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(TextLevel._resize)

    @staticmethod
    def _resize(module: "TextLevel", state: dict[str, Any], prefix: str, *rest: object) -> None:
        """A checkpoint's number of classes is taken over."""
        saved = state.get(prefix + "centroids")
        if (
            saved is not None
            and saved.shape[0] == module.centroids.shape[0]
            and saved.shape[2] == module.centroids.shape[2]
        ):
            module.centroids = module.centroids.new_zeros(saved.shape)

    def forward(
        self,
        base: Sequence[tuple[Tensor, Tensor, Tensor]],
        pseudo: Sequence[tuple[Tensor, Tensor, Tensor]],
        labels: Tensor,
        texts: Tensor,
    ) -> dict[str, Tensor]:
        """The losses, summed over stages; zero if the batch has fewer than two base classes.

        Args:
            base: of each stage and this process, the distilled features (b, D) of queries with a base box, the box's
            label (b,) and
                the IoU of the two (b,). pseudo: likewise features (p, D), the boxes' texts u (p, D) and weights w (p,).
            labels: of all base boxes of this process. texts: (K, D) of the base classes.
        """
        if self.centroids.shape[1] == 0:
            self.centroids = texts.detach().to(self.centroids).repeat(len(self.centroids), 1, 1)
        if self.centroids.shape[1] != len(texts):
            raise HdovdError(
                f"the moving means of this detector are of {self.centroids.shape[1]} base classes, expected "
                f"{len(texts)}"
            )
        texts = texts.float()
        every_label = gather_rows(labels.to(texts)[:, None])[:, 0].long()
        present = torch.zeros(len(texts), dtype=torch.bool, device=texts.device).index_fill(0, every_label, True)
        enough = present.sum() >= MIN_CLASSES
        self.updates = self.updates + enough
        decay = self.config.decay * (1 - (-self.updates.to(texts) / self.config.decay_updates).exp())
        aligned, related, moved = [], [], []
        for old, of_base, of_pseudo in zip(self.centroids, base, pseudo, strict=True):
            features, label, iou = _gathered(*of_base)
            new = fused(features, label[:, 0].long(), iou[:, 0], len(texts))
            features, u, weight = _gathered(*of_pseudo)
            students = F.normalize(torch.cat([torch.where(present[:, None], new, old), features]), dim=1)
            teachers = F.normalize(torch.cat([texts, u]), dim=1)
            aligned.append(
                text_alignment_loss(
                    students,
                    teachers,
                    torch.cat([present.to(weight), weight[:, 0]]),
                    (present.sum() + len(u)).clamp(min=1),
                    self.config.tau,
                )
            )
            related.append(
                relation_loss(students, teachers, self.config.relation_tau, self.config.relation_temperature)
            )
            moved.append(torch.where((present & enough)[:, None], decay * old + (1 - decay) * new.detach(), old))
        self.centroids = torch.stack(moved)
        return {
            "text_alignment": self.config.alignment_weight * torch.stack(aligned).sum() * enough,
            "text_relation": self.config.relation_weight * torch.stack(related).sum() * enough,
        }


def fused(features: Tensor, labels: Tensor, iou: Tensor, classes: int) -> Tensor:
    """The centroid of each class: its rows, weighted by the softmax of their IoUs; zero for a class without rows.

    Args:
        features: (b, D). labels, iou: (b,). classes: K.

    Returns:
        (K, D), not normalised.
    """
    member = labels == torch.arange(classes, device=labels.device)[:, None]
    shares = torch.where(member, iou, -torch.inf).softmax(dim=1)
    with torch.autocast(features.device.type, enabled=False):
        return torch.where(member, shares, 0.0) @ features  # a class without rows has shares that are no numbers


def text_alignment_loss(students: Tensor, teachers: Tensor, weights: Tensor, count: Tensor, tau: float) -> Tensor:
    """Weighted cross-entropy of rows against texts, `1 / count sum_i w_i CE(tau x_i Y^T, i)`; one way, without a
    memory.

    Args:
        students, teachers: (n, D) L2-normalised X and Y. weights: (n,), 0 for a row that is no student. count: () of
        those that are.
    """
    with torch.autocast(students.device.type, enabled=False):
        rows = F.cross_entropy(
            tau * students @ teachers.T, torch.arange(len(students), device=students.device), reduction="none"
        )
    return (rows * weights).sum() / count


def _gathered(*columns: Tensor) -> list[Tensor]:
    """Rows of all processes: (n, D) each or (n,), which is taken for (n, 1); one transfer."""
    wide = [c.float() if c.dim() == 2 else c.float()[:, None] for c in columns]
    rows = gather_rows(torch.cat(wide, dim=1))
    return list(rows.split([c.shape[1] for c in wide], dim=1))
