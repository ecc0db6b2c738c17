"""From proposals to the RoIs that the head sees: matching, sampling, pooling.

B boxes of an image (base before pseudo), R RoIs, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou, roi_align

POOL_SIZE = 7
POSITIVE_IOU = 0.5


def sample_rois(proposals: Tensor, boxes: Tensor, samples: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Match proposals to boxes at IoU 0.5 and sample a fixed number of them; the boxes themselves take part.

    Args:
        proposals: (n, 4). boxes: (B, 4), may be empty.

    Returns:
        RoIs (R, 4) and the box each one belongs to (R,) int64, -1 for background; R is at most `samples`.
    """
    candidates = torch.cat([boxes, proposals])
    if len(boxes) == 0:
        keep = torch.randperm(len(candidates), device=candidates.device)[:samples]
        return candidates[keep], torch.full((len(keep),), -1, device=candidates.device)
    matched = Matcher(POSITIVE_IOU, POSITIVE_IOU, allow_low_quality_matches=False)(box_iou(boxes, candidates)).clamp(min=-1)
    positive, negative = BalancedPositiveNegativeSampler(samples, positive_share)([(matched >= 0).float()])
    keep = (positive[0].bool() | negative[0].bool()).nonzero().flatten()
    return candidates[keep], matched[keep]


class PyramidRoIAlign(nn.Module):
    """RoIAlign 7x7 from the pyramid level that fits a RoI's size (FPN, arXiv 1612.03144, equation 1)."""

    def __init__(self, levels: list[int], canonical_size: int, sampling_ratio: int = 0) -> None:
        super().__init__()
        self.levels = sorted(levels)
        self.canonical_size = canonical_size
        self.sampling_ratio = sampling_ratio

    def forward(self, features: dict[str, Tensor], rois: list[Tensor]) -> Tensor:
        """Pool the RoIs of a batch.

        Args:
            features: level name -> (N, C, h, w); level l has stride 2^l.
            rois: one (R_i, 4) a picture, xyxy pixels of the padded batch.

        Returns:
            (R, C, 7, 7) float32, image by image.
        """
        image = torch.cat([torch.full((len(r), 1), float(i), device=r.device) for i, r in enumerate(rois)])
        boxes = torch.cat(rois)
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
        wanted = torch.floor(4 + torch.log2(side / self.canonical_size + 1e-6)).clamp(self.levels[0], self.levels[-1])
        channels = features[str(self.levels[0])].shape[1]
        pooled = boxes.new_zeros(len(boxes), channels, POOL_SIZE, POOL_SIZE)
        indexed = torch.cat([image, boxes], dim=1)
        for level in self.levels:
            rows = (wanted == level).nonzero().flatten()
            level_map = features[str(level)].float()
            crops = roi_align(level_map, indexed[rows], POOL_SIZE, spatial_scale=math.ldexp(1.0, -level),
                              sampling_ratio=self.sampling_ratio, aligned=True)
            pooled = pooled.index_copy(0, rows, crops)
        return pooled
