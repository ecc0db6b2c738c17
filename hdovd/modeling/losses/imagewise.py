"""Level 3, image-wise distillation: the student's embedding of a whole image (METHOD section 6).

Resizing, RoIAlign and the mean over its bins are linear and separable: what they come to is a weighted mean of each
level's cells, with a weight a row and a weight a column. That is one small product a level, in place of maps of
interpolated values and a RoIAlign whose gradient is slow on CPUs.

N images, C pyramid channels, D embedding size. The loss itself is `contrastive.alignment_loss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 14  # a side: 7 bins of 2


class ImageHead(nn.Module):
    """P5 plus the finer levels resized to it -> RoIAlign 7x7 over the valid area -> mean -> LN -> Linear ->
    normalise."""

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
        sizes = torch.tensor(image_sizes, dtype=torch.float32).to(levels[-1].device, non_blocking=True)
        height, width = levels[-1].shape[-2:]
        with torch.autocast(sizes.device.type, enabled=False):
            rows, columns = area_weights(sizes[:, 0] / stride, height), area_weights(sizes[:, 1] / stride, width)
            means = [
                weighted_mean(
                    level,
                    rows @ resize_weights(height, level.shape[2], sizes.device),
                    columns @ resize_weights(width, level.shape[3], sizes.device),
                )
                for level in levels
            ]
            return F.normalize(self.project(self.norm(torch.stack(means).sum(dim=0))), dim=1)


def weighted_mean(level: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over cells of (N, C, h, w), weighted by the product of (N, h) row and (N, w) column weights: (N, C)
    float32."""
    cells = (rows[:, :, None] * columns[:, None, :]).flatten(1)
    return torch.bmm(level.float().flatten(2), cells[:, :, None])[:, :, 0]


def area_weights(lengths: Tensor, cells: int) -> Tensor:
    """What each cell of an axis contributes to the mean of RoIAlign's samples (aligned) from 0 to `lengths` (N,), in
    cells: (N, cells).
    """
    steps = (torch.arange(SAMPLES, device=lengths.device) + 0.5) / SAMPLES
    return _point_weights(lengths[:, None] * steps - 0.5, cells).mean(dim=1)


def resize_weights(cells: int, fine: int, device: torch.device | None = None) -> Tensor:
    """What each of `fine` cells contributes to each of `cells` after a bilinear resize (not aligned to corners):
    (cells, fine).
    """
    return _point_weights((torch.arange(cells, device=device) + 0.5) * (fine / cells) - 0.5, fine)


def _point_weights(points: Tensor, cells: int) -> Tensor:
    """Bilinear weights of points (...), in units of cells with centres at whole numbers, edges held: (..., cells)."""
    centres = torch.arange(cells, device=points.device)
    return (1 - (points.clamp(0, cells - 1)[..., None] - centres).abs()).clamp(min=0)
