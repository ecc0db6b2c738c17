"""Level 1 for queries: two memories a stage and the losses in visual space (METHOD section 4). Called by `model`.

n pairs of a stage, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hdovd.config.recipe import InstanceLossConfig
from hdovd.modeling.distributed import counts_of_ranks, gather_rows
from hdovd.modeling.feature_queue import FeatureQueue
from hdovd.modeling.losses import instance
from hdovd.modeling.losses.contrastive import alignment_loss


class InstanceLevels(nn.Module):
    """Pairs are those of all processes: every process pushes the same rows into its memories, which are in the checkpoint.

    (The released code's are of one process each, and lost with it.)
    """

    def __init__(self, config: InstanceLossConfig, stages: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.student_queues = nn.ModuleList(FeatureQueue(config.queue, dim) for _ in range(stages))
        self.teacher_queues = nn.ModuleList(FeatureQueue(config.queue, dim) for _ in range(stages))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> dict[str, Tensor]:
        """`students`, `teachers`: (n, D) L2-normalised q and e of each stage. The losses are summed over stages."""
        config = self.config
        aligned, related = [], []
        for q, e, student_queue, teacher_queue in zip(students, teachers, self.student_queues, self.teacher_queues, strict=True):
            assert isinstance(student_queue, FeatureQueue)
            assert isinstance(teacher_queue, FeatureQueue)
            counts = counts_of_ranks(len(q), q.device)
            q, e = gather_rows(q, counts), gather_rows(e, counts)
            if len(q) < instance.MIN_PAIRS:
                aligned.append(q.sum() * 0)
                continue
            aligned.append(alignment_loss(q, e, student_queue.read(), teacher_queue.read(), config.tau))
            related.append(instance.relation_loss(q, e, config.relation_tau, config.relation_temperature))
            student_queue.push(q)
            teacher_queue.push(e)
        nothing = aligned[0] * 0
        return {"instance_alignment": config.alignment_weight * torch.stack(aligned).sum(),
                "instance_relation": config.relation_weight * torch.stack([nothing, *related]).sum()}
