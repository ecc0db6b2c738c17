"""From proposals to the RoIs that the head sees: matching, sampling, pooling; and the two layers of every RoI head.

RoIAlign has a gradient of its own on a CPU, which all cores share; torchvision's runs on one, and took a third of a
training step. RoIAlign is linear, and separable in the axes: a bin is the sum of few cells, each times a weight of its
row and one of its column. Its gradient is then, for each cell, a weighted sum of rows of the bins' gradients: an
embedding bag. On a GPU torchvision's own gradient is used, and for the few RoIs that are very long.

B boxes of an image (base before pseudo), R RoIs, N pictures, C channels, h x w cells, B bins a side, K cells a bin
reaches over along one axis.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, roi_align

from hdovd.modeling.batching import Use, image_generator, sample_balanced

LONG = 8  # cells a bin, from which on a RoI's gradient is torchvision's: a few thin ones would widen the table for all


class RoIAlignOnCpu(torch.autograd.Function):
    """torchvision's `roi_align` (aligned), for training on a CPU.

    maps: (N, C, h, w) float32. rois: (R, 5) number of the picture, xyxy in pixels. bins: B. scale: cells a pixel.
    samples: points a bin and axis; 0 or less: as many as the bin has cells. Gives (R, C, B, B) float32, with a gradient
    for the maps and none for the RoIs.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, rois: Tensor, bins: int, scale: float, samples: int) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.bins, ctx.scale, ctx.samples = maps.shape, bins, scale, samples
        return cast(Tensor, roi_align(maps, rois, bins, scale, samples, aligned=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        sides = (rois[:, 3:] - rois[:, 1:3]).amax(dim=1) * ctx.scale
        long = sides > LONG * ctx.bins
        if not long.any():
            return _shared(gradients[0], rois, ctx), None, None, None, None
        of_maps = _shared(gradients[0][~long], rois[~long], ctx) + torch.ops.torchvision._roi_align_backward(
            gradients[0][long], rois[long], ctx.scale, ctx.bins, ctx.bins, *ctx.shape, ctx.samples, True
        )
        return of_maps, None, None, None, None


def _shared(gradient: Tensor, rois: Tensor, ctx: Any) -> Tensor:
    """The gradient (N, C, h, w) of the maps by RoIs (R, 5) whose bins reach over few cells; `gradient`: (R, C, B,
    B)."""
    (pictures, channels, height, width), bins = ctx.shape, ctx.bins
    if len(rois) == 0:
        return gradient.new_zeros(ctx.shape)
    row, of_row = reach(rois[:, 2] * ctx.scale - 0.5, rois[:, 4] * ctx.scale - 0.5, height, bins, ctx.samples)
    column, of_column = reach(rois[:, 1] * ctx.scale - 0.5, rois[:, 3] * ctx.scale - 0.5, width, bins, ctx.samples)
    cell = (row * width)[:, :, None, :, None] + column[:, None, :, None, :]  # (R, B, B, K, K)
    cell = cell + (rois[:, 0].int() * (height * width)).view(-1, 1, 1, 1, 1)
    weight = of_row[:, :, None, :, None] * of_column[:, None, :, None, :]
    of_bin = torch.arange(len(rois) * bins * bins, dtype=torch.int32).view(len(rois), bins, bins, 1, 1).expand_as(cell)
    taken = weight.flatten().nonzero()[:, 0]
    cell, order = cell.flatten()[taken].sort()
    order = taken[order]
    first = torch.searchsorted(cell, torch.arange(pictures * height * width + 1, dtype=torch.int32), out_int32=True)
    rows = gradient.flatten(2).transpose(1, 2).reshape(-1, channels)
    of_maps = F.embedding_bag(
        of_bin.reshape(-1)[order],
        rows,
        first,
        mode="sum",
        per_sample_weights=weight.flatten()[order],
        include_last_offset=True,
    )
    return of_maps.view(pictures, height, width, channels).permute(0, 3, 1, 2)


def reach(low: Tensor, high: Tensor, cells: int, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Which cells of an axis each bin takes, and by how much: (R, B, K) int32 and float32.

    `low`, `high`: (R,) the ends of the RoIs, in cells with centres at whole numbers. Points more than a cell outside
    count as zero, others outside as the cell at the edge (RoIAlign, arXiv 1703.06870, as torchvision has it).
    """
    bin_size = (high - low) / bins
    points = torch.full_like(low, samples) if samples > 0 else bin_size.ceil().clamp(min=0)
    number = torch.arange(max(1, int(points.max())), device=low.device)
    taken = number < points[:, None]
    step = (number + 0.5) / points.clamp(min=1)[:, None]  # (R, points)
    place = (
        low[:, None, None] + (torch.arange(bins, device=low.device)[:, None] + step[:, None]) * bin_size[:, None, None]
    )
    share = (taken / points.clamp(min=1)[:, None])[:, None] * ((place >= -1) & (place <= cells))
    place = place.clamp(0, cells - 1)
    lower = place.floor()
    rest = place - lower
    lower = lower.long()
    dense = torch.zeros(len(low), bins, cells, device=low.device)
    dense.scatter_add_(2, lower, share * (1 - rest)).scatter_add_(2, (lower + 1).clamp(max=cells - 1), share * rest)
    some = dense > 0
    first = some.int().argmax(dim=2)
    last = cells - 1 - some.flip(2).int().argmax(dim=2)
    width = int(torch.where(some.any(dim=2), last - first, 0).max()) + 1
    cell = first[..., None] + torch.arange(width, device=low.device)
    inside = cell < cells
    cell = cell.clamp(max=cells - 1)
    return cell.int(), dense.gather(2, cell) * inside


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
    firsts = accumulate([0, *counts[:-1]])
    return torch.cat([torch.where(own >= 0, own + first, -1) for own, first in zip(matches, firsts, strict=True)])


class RoIHead(nn.Module):
    """RoI features -> two FC -> box offsets, and whatever a subclass makes of `hidden`."""

    def __init__(self, channels: int, fc_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * POOL_SIZE**2, fc_channels)
        self.fc2 = nn.Linear(fc_channels, fc_channels)
        self.deltas = nn.Linear(fc_channels, 4)

    def hidden(self, pooled: Tensor) -> Tensor:
        """(R, C, 7, 7) -> (R, F)."""
        return cast(Tensor, self.fc2(self.fc1(pooled.flatten(1)).relu()).relu())

    def initialise(self, score: nn.Linear) -> None:
        """The first weights of all layers; `score` is the subclass's own. Called when every layer is there."""
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.deltas, 0.001), (score, 0.01)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


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
        if torch.jit.is_tracing():  # type: ignore[attr-defined]  # how many there are is not known then
            rows = [(wanted == level).nonzero().flatten() for level in self.levels]
        else:
            counts = torch.stack([(wanted == level).sum() for level in self.levels]).tolist()
            rows = list(wanted.argsort(stable=True).split(counts))
        crops = [self.crop(features, level, indexed[some]) for level, some in zip(self.levels, rows, strict=True)]
        return torch.cat(crops).index_select(0, torch.cat(rows).argsort())

    def level_of(self, boxes: Tensor) -> Tensor:
        """(R, 4) boxes -> (R,) float32 whole numbers: the level that each is pooled from."""
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
        return torch.floor(4 + torch.log2(side / self.canonical_size + 1e-6)).clamp(self.levels[0], self.levels[-1])

    def crop(self, features: dict[str, Tensor], level: int, indexed: Tensor) -> Tensor:
        """RoIs (r, 5), the picture's number before each box, all from one level -> (r, C, 7, 7) float32."""
        maps, scale = features[str(level)].float(), math.ldexp(1.0, -level)
        if maps.requires_grad and maps.device.type == "cpu":
            return cast(Tensor, RoIAlignOnCpu.apply(maps, indexed, POOL_SIZE, scale, self.sampling_ratio))
        return cast(Tensor, roi_align(maps, indexed, POOL_SIZE, scale, self.sampling_ratio, aligned=True))
