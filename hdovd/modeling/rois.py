"""From proposals to the RoIs that the head sees: matching, sampling, pooling.

B boxes of an image (base before pseudo), R RoIs, C channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, roi_align

from hdovd.modeling.roi_gradient import roi_align_on_cpu
from hdovd.modeling.sampling import Use, image_generator, sample_balanced

POOL_SIZE = 7
POSITIVE_IOU = 0.5
NOT_DRAWN = -2


def sample_rois_of_images(
    proposals: Sequence[Tensor],
    boxes: Sequence[Tensor],
    samples: int,
    positive_share: float,
    keys: Sequence[int | None],
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Match proposals to boxes at IoU 0.5 and sample a fixed number of them; the boxes themselves take part.

    The host waits for the device once.

    Args:
        proposals: (n, 4) an image. boxes: (B, 4) an image, may be empty.
        keys: of the images; on its own alone an image's choice depends. None draws from torch's global generator.

    Returns:
        RoIs (R, 4) an image, R at most `samples`; the box that each one belongs to, (R,) int64 an image, -1 for
        background; and the places (P,) int64 of those that belong to one, in the batch.
    """
    candidates = [torch.cat(pair) for pair in zip(boxes, proposals, strict=True)]
    drawn = torch.cat(
        [
            _drawn(some, own, samples, positive_share, key)
            for some, own, key in zip(candidates, boxes, keys, strict=True)
        ]
    )
    on_host = drawn.cpu()
    keep = on_host > NOT_DRAWN
    counts = [int(own.sum()) for own in keep.split([len(some) for some in candidates])]
    rows, positive = keep.nonzero().flatten(), (on_host[keep] >= 0).nonzero().flatten()
    rows, positive = torch.cat([rows, positive]).to(drawn.device, non_blocking=True).split([len(rows), len(positive)])
    return list(torch.cat(candidates)[rows].split(counts)), list(drawn[rows].split(counts)), positive


def _drawn(candidates: Tensor, boxes: Tensor, samples: int, positive_share: float, key: int | None) -> Tensor:
    """The box (n,) int64 that each candidate (n, 4) belongs to, -1 for background, NOT_DRAWN for those that do not take
    part.
    """
    matched = torch.full((len(candidates),), -1, device=candidates.device)
    if len(boxes):
        matched = Matcher(POSITIVE_IOU, POSITIVE_IOU, allow_low_quality_matches=False)(
            box_iou(boxes, candidates)
        ).clamp(min=-1)
    generator = image_generator(key, Use.ROIS, candidates.device)
    positive, negative = sample_balanced(matched >= 0, matched < 0, samples, positive_share, generator)
    return matched.masked_fill(~(positive | negative), NOT_DRAWN)


def number_boxes(matches: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Number the boxes of a batch image by image: the box (R,) int64 that each RoI of the batch belongs to, or -1.

    Args:
        matches: (R_i,) an image, as `sample_rois_of_images` returns. counts: boxes of each image.
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
        """Pool the RoIs of a batch. The host waits for the device once: for how many RoIs each level has.

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
        counts = torch.stack([(wanted == level).sum() for level in self.levels]).tolist()
        order = wanted.argsort(stable=True)
        crops = torch.cat(
            [
                self.crop(features, level, some)
                for level, some in zip(self.levels, indexed[order].split(counts), strict=True)
            ]
        )
        return crops.index_select(0, order.argsort())

    def level_of(self, boxes: Tensor) -> Tensor:
        """(R, 4) boxes -> (R,) float32 whole numbers: the level that each is pooled from."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
        return torch.floor(4 + torch.log2(side / self.canonical_size + 1e-6)).clamp(self.levels[0], self.levels[-1])

    def crop(self, features: dict[str, Tensor], level: int, indexed: Tensor) -> Tensor:
        """RoIs (r, 5), the picture's number before each box, all from one level -> (r, C, 7, 7) float32."""
        maps, scale = features[str(level)].float(), math.ldexp(1.0, -level)
        if maps.requires_grad and maps.device.type == "cpu":
            return roi_align_on_cpu(maps, indexed, POOL_SIZE, scale, self.sampling_ratio)
        crops: Tensor = roi_align(
            maps, indexed, POOL_SIZE, spatial_scale=scale, sampling_ratio=self.sampling_ratio, aligned=True
        )
        return crops
