"""Level 3 as a part of the detector: its projection, its two memories and its loss (METHOD section 6)."""

import torch
from torch import Tensor, nn

from hdovd.config.recipe import ImageLossConfig
from hdovd.modeling.base import StepContext
from hdovd.modeling.distributed import FeatureQueue, counts_of_ranks, gather_rows
from hdovd.modeling.losses.contrastive import alignment_loss
from hdovd.modeling.losses.imagewise import ImageHead


class ImageLevel(nn.Module):
    """Images are those of all processes: every process pushes the same rows into its memories, in the order of the
    images.

    levels: the pyramid levels that the image's embedding is made of.
    """

    def __init__(self, config: ImageLossConfig, levels: list[int], channels: int, dim: int) -> None:
        super().__init__()
        self.config, self.levels = config, sorted(levels)
        self.head = ImageHead(channels, dim)
        self.student_queue = FeatureQueue(config.queue, dim)
        self.teacher_queue = FeatureQueue(config.queue, dim)

    def forward(self, view: StepContext) -> dict[str, Tensor]:
        maps = [view.features[str(level)] for level in self.levels]
        g = self.head(maps, view.image_sizes, 2 ** self.levels[-1])
        counts = counts_of_ranks(len(g), g.device)
        g, f = gather_rows(g, counts), gather_rows(torch.stack([t.image_embedding for t in view.targets]), counts)
        loss = alignment_loss(g, f, self.student_queue.read(), self.teacher_queue.read(), self.config.tau)
        self.student_queue.push(g)
        self.teacher_queue.push(f)
        return {"image_alignment": self.config.weight * loss}
