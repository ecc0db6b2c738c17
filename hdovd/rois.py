"""From proposals to the RoIs that the head sees: matching, sampling, pooling.

B boxes of an image (base before pseudo), R RoIs, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, roi_align

from hdovd.roi_gradient import roi_align_on_cpu
from hdovd.sampling import Use, image_generator, sample_balanced

POOL_SIZE = 7
POSITIVE_IOU = 0.5


def sample_rois(proposals: Tensor, boxes: Tensor, samples: int, positive_share: float,
                key: int | None = None) -> tuple[Tensor, Tensor]:
    """Match proposals to boxes at IoU 0.5 and sample a fixed number of them; the boxes themselves take part.

    Args:
        proposals: (n, 4). boxes: (B, 4), may be empty.
        key: the image's, which alone the choice depends on; None draws from torch's global generator.

    Returns:
        RoIs (R, 4) and the box each one belongs to (R,) int64, -1 for background; R is at most `samples`.
    """
    candidates = torch.cat([boxes, proposals])
    matched = torch.full((len(candidates),), -1, device=candidates.device)
    if len(boxes):
        matched = Matcher(POSITIVE_IOU, POSITIVE_IOU, allow_low_quality_matches=False)(box_iou(boxes, candidates)).clamp(min=-1)
    generator = image_generator(key, Use.ROIS, candidates.device)
    positive, negative = sample_balanced(matched >= 0, matched < 0, samples, positive_share, generator)
    keep = (positive | negative).nonzero().flatten()
    return candidates[keep], matched[keep]


def number_boxes(matches: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Number the boxes of a batch image by image: the box (R,) int64 that each RoI of the batch belongs to, or -1.

    Args:
        matches: (R_i,) an image, as `sample_rois` returns. counts: boxes of each image.
    """
    numbered, first = [], 0
    for match, count in zip(matches, counts, strict=True):
        numbered.append(torch.where(match >= 0, match + first, -1))
        first += count
    return torch.cat(numbered)


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
        image = torch.cat([torch.full_like(r[:, :1], i) for i, r in enumerate(rois)])
        boxes = torch.cat(rois)
        wanted = self.level_of(boxes)
        indexed = torch.cat([image, boxes], dim=1)
        rows = [(wanted == level).nonzero().flatten() for level in self.levels]
        crops = torch.cat([self.crop(features, level, indexed[r]) for level, r in zip(self.levels, rows, strict=True)])
        return crops.index_select(0, torch.cat(rows).argsort())

    def level_of(self, boxes: Tensor) -> Tensor:
        """(R, 4) boxes -> (R,) float32 whole numbers: the level that each is pooled from."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
        return torch.floor(4 + torch.log2(side / self.canonical_size + 1e-6)).clamp(self.levels[0], self.levels[-1])

    def crop(self, features: dict[str, Tensor], level: int, indexed: Tensor) -> Tensor:
        """RoIs (r, 5), the picture's number before each box, all from one level -> (r, C, 7, 7) float32."""
        maps, scale = features[str(level)].float(), math.ldexp(1.0, -level)
        if maps.requires_grad and maps.device.type == "cpu":
            return roi_align_on_cpu(maps, indexed, POOL_SIZE, scale, self.sampling_ratio)
        crops: Tensor = roi_align(maps, indexed, POOL_SIZE, spatial_scale=scale, sampling_ratio=self.sampling_ratio, aligned=True)
        return crops
