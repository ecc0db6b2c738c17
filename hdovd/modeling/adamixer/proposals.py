"""Where queries come from: a dense class-agnostic head whose best distinct boxes they are (arXiv 2303.12776).

Two heads share a trunk. The main one is trained on distinct candidates alone and gives the queries; the auxiliary one
is trained densely, and is of no use afterwards. The losses are in `losses`. N pictures, A positions of all levels, M
candidates of a picture, Q queries, C channels, D embedding size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdovd.config.detector import GROUPS_OF_NORM, QueryProposalsConfig
from hdovd.modeling.adamixer.boxes import SamplingTable, to_xyzr
from hdovd.modeling.boxes import nms_of_images
from hdovd.modeling.queries.pairs import Candidates

RARE = -math.log(99)  # logit of 1 %


@dataclass(frozen=True, slots=True)
class DensePredictions:
    """probability (N, A) of there being an object, boxes (N, A, 4) xyxy pixels; levels one after the other, row by
    row."""

    probability: Tensor
    boxes: Tensor


class ProposalTrunk(nn.Module):
    """Two convolutions, the same for all levels; between them a level takes a part of its neighbours' channels in place
    of its own.
    """

    def __init__(self, channels: int, shuffle: int) -> None:
        super().__init__()
        self.own, self.shuffle = channels - 2 * shuffle, shuffle
        self.conv1, self.conv2 = _conv_block(channels), _conv_block(channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(N, C, h, w) a level, fine to coarse -> the same shapes."""
        maps = [self.conv1(m) for m in maps]
        return [self.conv2(self._exchanged(maps, level)) for level in range(len(maps))]

    def _exchanged(self, maps: list[Tensor], level: int) -> Tensor:
        """The last channels from the coarser level, those before from the finer one; at the ends from itself."""
        coarser, finer = maps[min(level + 1, len(maps) - 1)], maps[max(level - 1, 0)]
        size = maps[level].shape[-2:]
        parts = [
            maps[level][:, : self.own],
            _resized(coarser[:, self.own + self.shuffle :], size),
            _resized(finer[:, self.own : self.own + self.shuffle], size),
        ]
        return torch.cat(parts, dim=1)


class DenseHead(nn.Module):
    """A box and an object's probability at every position."""

    def __init__(self, channels: int, dim: int, levels: int) -> None:
        super().__init__()
        self.deltas = _branch(channels, 4)
        self.feature = _branch(channels, dim)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(levels))
        self.object_scale = nn.Parameter(torch.ones(1))
        self.object_bias = nn.Parameter(torch.full((1,), RARE))

    def forward(self, maps: list[Tensor], strides: list[int], object_text: Tensor) -> DensePredictions:
        """`object_text`: (D,) the embedding of "object"."""
        text = F.normalize(object_text, dim=0)
        probabilities, boxes = [], []
        for level, (pixels, stride) in enumerate(zip(maps, strides, strict=True)):
            reach = self.scales[level] * self.deltas(pixels).float().exp().flatten(2).transpose(1, 2) * stride
            centres = positions(pixels.shape[-2:], stride, pixels.device)
            boxes.append(torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1))
            # Released code: each channel is normalised over the positions of its level, not each position over its
            # channels, so that this is no cosine. Weights that were trained with it mean nothing without it.
            feature = self.feature(pixels).float().flatten(2)
            aligned = ((text / feature.norm(dim=2).clamp(min=1e-12))[:, None] @ feature)[:, 0]
            probabilities.append(torch.sigmoid(self.object_scale * aligned + self.object_bias))
        return DensePredictions(torch.cat(probabilities, dim=1), torch.cat(boxes, dim=1))


class QueryProposals(nn.Module):
    """The trunk, both heads, and the choice of queries."""

    def __init__(self, config: QueryProposalsConfig, channels: int, dim: int, levels: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = ProposalTrunk(channels, config.shuffle)
        self.main, self.auxiliary = DenseHead(channels, dim, levels), DenseHead(channels, dim, levels)
        self.content_norm = nn.LayerNorm(channels)

    def candidates(self, dense: DensePredictions, positions_of_levels: list[int]) -> Candidates:
        """The best of each level, with gradient, and which of them are distinct. The NMS waits for the device, once for
        the batch.

        Of equal ones the first: in the padding all are equal, and without an order each kernel would find other objects
        from there.
        """
        chosen, first = [], 0
        for count in positions_of_levels:
            best = (
                dense.probability[:, first : first + count]
                .sort(dim=1, descending=True, stable=True)
                .indices[:, : self.config.pre_nms]
            )
            chosen.append(best + first)
            first += count
        index = torch.cat(chosen, dim=1)
        probability = dense.probability.gather(1, index)
        boxes = dense.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        kept = nms_of_images(boxes.detach(), probability.detach(), self.config.nms)
        distinct = (
            torch.zeros(index.numel(), dtype=torch.bool, device=index.device).index_fill(0, kept, True).view_as(index)
        )
        return Candidates(probability, boxes, distinct & (probability > 0))

    @torch.no_grad()
    def choose(self, candidates: Candidates, queries: int) -> Tensor:
        """The boxes (N, Q, 4) xyxy that queries start from: distinct candidates, best first.

        Where a picture has fewer than `queries` of them, those that the NMS dropped follow, best first, so that all
        pictures of a batch have as many; Q is less than `queries` only where there are fewer candidates of either kind.
        (The released code stops.)
        """
        order = (
            by_rank(candidates.probability, candidates.distinct)
            .sort(dim=1, descending=True, stable=True)
            .indices[:, :queries]
        )
        return candidates.boxes.gather(1, order[..., None].expand(-1, -1, 4))

    def content(self, table: SamplingTable, boxes: Tensor) -> Tensor:
        """What queries of boxes (N, Q, 4) start from, (N, Q, C): the pyramid at the box's centre, at the level of its
        size.
        """
        points = to_xyzr(boxes)[..., None, None, :3]
        content: Tensor = self.content_norm(table.sample(points, 1)[..., 0, 0, :])
        return content


def by_rank(probability: Tensor, distinct: Tensor) -> Tensor:
    """Numbers by which candidates of some probability (...) are in order, the distinct ones (...) bool first, which
    keep all their bits: small ones lie closer together than the bits of a number above 1.
    """
    return probability.where(distinct, probability - 1)


def positions(size: tuple[int, int] | torch.Size, stride: int, device: torch.device) -> Tensor:
    """The centres (h w, 2) x, y in pixels of a level's cells, row by row."""
    down, across = (torch.arange(side, device=device, dtype=torch.float32) * stride + stride / 2 for side in size)
    return torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).flatten(0, 1)


def _conv_block(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return nn.Sequential(conv, nn.GroupNorm(GROUPS_OF_NORM, channels), nn.ReLU(inplace=True))


def _branch(channels: int, out: int) -> nn.Sequential:
    first, second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, out, 1)
    for conv in (first, second):
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.get_parameter("bias"))
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=True)
