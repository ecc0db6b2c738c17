"""Level 3, image-wise distillation: the student's embedding of a whole image (METHOD section 6).

N images, C pyramid channels, D embedding size. The loss itself is `contrastive.alignment_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align


class ImageHead(nn.Module):
    """P5 plus the finer levels resized to it -> RoIAlign 7x7 over the valid area -> mean -> LN -> Linear -> normalise."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, dim)

    def forward(self, levels: list[Tensor], image_sizes: list[tuple[int, int]], stride: int) -> Tensor:
        """Embed the images of a batch.

        Args:
            levels: feature maps (N, C, h, w), fine to coarse; the last one has `stride`.
            image_sizes: (height, width) pixels of the valid area of each padded image.

        Returns:
            (N, D) L2-normalised.
        """
        fused = levels[-1].float()
        for level in levels[:-1]:
            fused = fused + F.interpolate(level.float(), fused.shape[-2:], mode="bilinear", align_corners=False)
        areas = [fused.new_tensor([[0, 0, width, height]]) for height, width in image_sizes]
        pooled = roi_align(fused, areas, 7, spatial_scale=1 / stride, sampling_ratio=2, aligned=True)
        with torch.autocast(fused.device.type, enabled=False):
            return F.normalize(self.project(self.norm(pooled.mean(dim=(2, 3)))), dim=1)
