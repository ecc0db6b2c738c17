"""Level 1 as a part of the detector: its two memories and its two losses (METHOD section 4).

n pairs of this process, D embedding size.
"""

import torch
from torch import Tensor, nn

from hdovd.config.recipe import InstanceLossConfig
from hdovd.modeling.base import StepContext
from hdovd.modeling.distributed import FeatureQueue, counts_of_ranks, gather_rows
from hdovd.modeling.losses import instance
from hdovd.modeling.losses.contrastive import alignment_loss


class InstanceLevel(nn.Module):
    """Pairs are those of all processes: every process pushes the same rows into its memories.

    The order of pairs, and so of rows in the memories, is that of the images; nothing else depends on it.
    """

    def __init__(self, config: InstanceLossConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.student_queue = FeatureQueue(config.queue, dim)
        self.teacher_queue = FeatureQueue(config.queue, dim)

    def forward(self, view: StepContext) -> dict[str, Tensor]:
        assert view.d is not None  # the detector builds the feature for this level
        teachers = torch.cat([rows for t in view.targets for rows in (t.embeddings, t.pseudo_embeddings)])
        q, used = instance.box_students(view.d, view.box_of_roi[view.box_of_roi >= 0], len(teachers))
        aligned, related = pair_losses(q, teachers[used], self.student_queue, self.teacher_queue, self.config)
        return {
            "instance_alignment": self.config.alignment_weight * aligned,
            "instance_relation": self.config.relation_weight * related,
        }


def pair_losses(
    q: Tensor, e: Tensor, student_queue: FeatureQueue, teacher_queue: FeatureQueue, config: InstanceLossConfig
) -> tuple[Tensor, Tensor]:
    """Alignment and relation loss of rows q and e (n, D), L2-normalised, with those of all processes, which go into
    the memories; zero, and no memory changes, if there are too few.
    """
    counts = counts_of_ranks(len(q), q.device)
    q, e = gather_rows(q, counts), gather_rows(e, counts)
    if len(q) < instance.MIN_PAIRS:
        return q.sum() * 0, q.sum() * 0
    aligned = alignment_loss(q, e, student_queue.read(), teacher_queue.read(), config.tau)
    student_queue.push(q)
    teacher_queue.push(e)
    return aligned, instance.relation_loss(q, e, config.relation_tau, config.relation_temperature)
