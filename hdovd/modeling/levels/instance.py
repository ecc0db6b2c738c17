"""Level 1 as a part of the detector: its two memories and its two losses (METHOD section 4)."""

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
        counts = counts_of_ranks(len(q), q.device)
        q, e = gather_rows(q, counts), gather_rows(teachers[used], counts)
        if len(q) < instance.MIN_PAIRS:
            nothing = view.d.sum() * 0
            return {"instance_alignment": nothing, "instance_relation": nothing}
        config = self.config
        aligned = alignment_loss(q, e, self.student_queue.read(), self.teacher_queue.read(), config.tau)
        related = instance.relation_loss(q, e, config.relation_tau, config.relation_temperature)
        self.student_queue.push(q)
        self.teacher_queue.push(e)
        return {
            "instance_alignment": config.alignment_weight * aligned,
            "instance_relation": config.relation_weight * related,
        }
