"""AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as HD-OVD distils into it (2503.10152; METHOD section
11): where its queries come from, a dense class-agnostic head whose best distinct boxes they are, and the whole.

Two heads share a trunk. The main one is trained on distinct candidates alone, one to one with boxes (2303.12776,
section 3.3), and gives the queries; the auxiliary one is trained densely, on the best few positions of each box (TOOD,
arXiv 2108.07755, section 3.2), and is of no use afterwards. Both learn by a quality focal loss (arXiv 2006.04388) and
GIoU, towards quality = p * IoU^power (HD-OVD, METHOD section 11). Released code: pictures without a box teach neither
head.

A training step waits for the device three times: for the sides of the pseudo boxes, for the proposals' NMS, and for the
costs that queries and boxes are paired by. N pictures, A positions of all levels, M candidates and H objects of a
picture, padded; Q queries, C channels, D embedding size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import GROUPS_OF_NORM, AdaMixerConfig, QueryProposalsConfig
from hdovd.config.recipe import Recipe
from hdovd.modeling.adamixer.decoder import DecoderStage, SamplingTable, to_corners, to_xyzr
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.boxes import best_places, nms_of_images, overlap, taken
from hdovd.modeling.distributed import divisor
from hdovd.modeling.queries.detector import ForwardOutput, QueryDetector, Step, xavier
from hdovd.modeling.queries.pairs import NONE, Candidates

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
        for own in dense.probability.split(positions_of_levels, dim=1):
            chosen.append(best_places(own, self.config.pre_nms) + first)
            first += own.shape[1]
        index = torch.cat(chosen, dim=1)
        probability = dense.probability.gather(1, index)
        boxes = dense.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        kept = nms_of_images(boxes.detach(), probability.detach(), self.config.nms)
        distinct = torch.zeros_like(probability).flatten().index_fill(0, kept, 1.0).view_as(index) > 0
        return Candidates(probability, boxes, distinct & (probability > 0))

    @torch.no_grad()
    def choose(self, candidates: Candidates, queries: int) -> Tensor:
        """The boxes (N, Q, 4) xyxy that queries start from: distinct candidates, best first.

        Where a picture has fewer than `queries` of them, those that the NMS dropped follow, best first, so that all
        pictures of a batch have as many; Q is less than `queries` only where there are fewer candidates of either kind.
        (The released code stops.)
        """
        order = best_places(by_rank(candidates.probability, candidates.distinct), queries)
        return candidates.boxes.gather(1, order[..., None].expand(-1, -1, 4))

    def content(self, table: SamplingTable, boxes: Tensor) -> Tensor:
        """What queries of boxes (N, Q, 4) start from, (N, Q, C): the pyramid at the box's centre, at the level of its
        size.
        """
        content: Tensor = self.content_norm(table.sample(to_xyzr(boxes)[..., None, None, :3], 1)[..., 0, 0, :])
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
    xavier(first, second)
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=True)


# --- what trains both heads ---

SMALL = 1e-7  # added to what a quality is divided by; released code. It is felt where p * IoU^6 is as small
LEAST_INSIDE = 0.01  # pixels between a positive position and each side of its box; released code


def quality_focal_rows(probability: Tensor, quality: Tensor, positive: Tensor) -> Tensor:
    """BCE(p, y) |y - p|^2 of positives, BCE(p, 0) p^2 of all others; any shape, float32."""
    with torch.autocast(probability.device.type, enabled=False):
        wanted = torch.where(positive, quality, 0.0)
        rows = F.binary_cross_entropy(probability, wanted, reduction="none")
        return rows * (wanted - probability).abs() ** 2


def main_losses(
    found: Candidates, objects: Tensor, is_object: Tensor, paired: Tensor, config: QueryProposalsConfig
) -> tuple[Tensor, Tensor]:
    """Weighted class and box loss of the main head.

    Args:
        objects: (N, H, 4). is_object: (N, H) bool. paired: (N, H) int64, the candidate of each object or NONE.
    """
    is_paired = paired != NONE
    row = paired.clamp(min=0)
    iou, giou = overlap(taken(found.boxes, row), objects)
    aligned = found.probability.detach().gather(1, row) * iou.detach() ** config.iou_power
    quality = torch.where(is_paired, aligned / (aligned + SMALL) * iou.detach(), 0.0)
    counted = found.distinct & is_object.any(dim=1, keepdim=True)
    return _quality_losses(found.probability, counted, row, is_paired, quality, giou, config)


def auxiliary_losses(
    dense: DensePredictions,
    centres: Tensor,
    valid: Tensor,
    objects: Tensor,
    is_object: Tensor,
    config: QueryProposalsConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted class and box loss of the auxiliary head.

    Args:
        centres: (A, 2) x, y of the positions. valid: (N, A) bool, those that count.
        objects: (N, H, 4). is_object: (N, H) bool.
    """
    best, quality = aligned_positions(dense, centres, valid, objects, is_object, config)
    counted = valid & is_object.any(dim=1, keepdim=True)
    _, giou = overlap(taken(dense.boxes, best.flatten(1)).unflatten(1, best.shape[1:]), objects[:, None])
    return _quality_losses(dense.probability, counted, best, quality > NONE, quality.clamp(min=0), giou, config)


@torch.no_grad()
def aligned_positions(
    dense: DensePredictions,
    centres: Tensor,
    valid: Tensor,
    objects: Tensor,
    is_object: Tensor,
    config: QueryProposalsConfig,
) -> tuple[Tensor, Tensor]:
    """The positions of each object that are best aligned with it, at most k, and the quality that they are to say.

    A position counts if p * IoU^power is over zero, and if it lies within the object; one that several objects want is
    the one's of the highest IoU. The quality is that measure, scaled so that an object's best position has its highest
    IoU.

    Returns:
        (N, k, H) int64 positions, (N, k, H) qualities, NONE for a position that does not count.
    """
    iou, _ = overlap(dense.boxes[:, :, None], objects[:, None])
    measure = dense.probability[..., None] * iou**config.iou_power
    measure = torch.where(valid[..., None] & is_object[:, None], measure, 0.0)
    strength, best = measure.topk(min(config.aux_positives, measure.shape[1]), dim=1)
    place = centres[best]
    inside = (
        torch.cat([place - objects[:, None, :, :2], objects[:, None, :, 2:] - place], dim=-1).amin(dim=-1)
        > LEAST_INSIDE
    )
    wants = inside & (strength > 0)
    own = iou.gather(1, best)
    owner = torch.full_like(iou, NONE).scatter(1, best, torch.where(wants, own, NONE)).argmax(dim=2)
    wins = wants & (owner.gather(1, best.flatten(1)).view_as(best) == torch.arange(iou.shape[2], device=iou.device))
    strength, own = strength * wins, own * wins
    quality = strength / (strength.amax(dim=1, keepdim=True) + SMALL) * own.amax(dim=1, keepdim=True)
    return best, torch.where(wins, quality, NONE)


def valid_positions(shapes: Sequence[torch.Size], strides: Sequence[int], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The centres (A, 2) x, y of all positions of levels of these shapes, and which count for each picture, (N, A)
    bool.

    Those within the picture as it would be padded alone, of levels whose stride is not longer than its shorter side
    (released code).

    Args:
        sizes: (N, 2) height, width of the pictures.
    """
    centres = torch.cat([positions(shape, stride, sizes.device) for shape, stride in zip(shapes, strides, strict=True)])
    counts = [h * w for h, w in shapes]
    stride = torch.cat([sizes.new_full((count,), stride) for count, stride in zip(counts, strides, strict=True)])
    alone = (sizes / SIZE_DIVISOR).ceil().flip(-1) * SIZE_DIVISOR
    within = (centres - stride[:, None] / 2 < alone[:, None]).all(dim=-1)
    return centres, within & (stride < sizes.amin(dim=1, keepdim=True) + 1)


def _quality_losses(
    probability: Tensor,
    counted: Tensor,
    place: Tensor,
    positive: Tensor,
    quality: Tensor,
    giou: Tensor,
    config: QueryProposalsConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted class and box loss, both divided by the sum of qualities.

    Args:
        probability: (N, X). counted: (N, X) bool. place: (N, ...) where boxes are found; positive: (N, ...) bool, where
        they are; quality, giou: (N, ...) of those.
    """
    slot = torch.where(positive, place, probability.shape[1]).flatten(1)  # where there is no box: one past the last
    wanted = _scattered(probability, slot, quality.flatten(1))
    is_positive = _scattered(probability, slot, positive.float().flatten(1)) > 0
    rows, count = quality_focal_rows(probability, wanted, is_positive) * counted, divisor(quality.sum())
    return config.class_weight * rows.sum() / count, config.box_weight * (quality * (1 - giou)).sum() / count


def _scattered(like: Tensor, slot: Tensor, values: Tensor) -> Tensor:
    """Zeros (N, X) like `like`, with values (N, n) at slots (N, n); slot X is nowhere."""
    rows = like.new_zeros(len(like), like.shape[1] + 1)
    return rows.scatter_reduce(1, slot, values.to(rows), "amax")[:, :-1]


# --- the detector ---


@dataclass(frozen=True, slots=True)
class AdaMixerOutput(ForwardOutput):
    """auxiliary: what the auxiliary head of the proposals found, None where nobody asked. Features are normalised; each
    box has the gradient of its own stage's deltas alone.
    """

    auxiliary: DensePredictions | None


class AdaMixer(QueryDetector):
    """The query-based detector of the paper's headline: backbone, proposals, stages, adapters, levels."""

    training_parts = ("proposals.auxiliary.", "instance_level.", "text_level.", "image_level.", "extra.")
    exportable = "hdovd.modeling.export.detectors:ExportableDetector"
    config: AdaMixerConfig

    def __init__(self, recipe: Recipe, dim: int, initialise: bool = True) -> None:
        super().__init__(recipe, dim, "adamixer")
        config = self.config
        channels, levels = config.backbone.fpn_channels, config.backbone.levels
        self.strides = [2**level for level in (*levels, levels[-1] + 1)]
        self.backbone = build_backbone(config.backbone, initialise)
        xavier(self.backbone.get_submodule("fpn"))
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS_OF_NORM, channels) for _ in self.strides)
        self.proposals = QueryProposals(config.proposals, channels, dim, len(levels))
        self.stages = nn.ModuleList(DecoderStage(config.decoder, channels, dim) for _ in range(config.decoder.stages))
        self.finish()

    def find(self, batch: ImageList, step: Step | None = None) -> AdaMixerOutput:
        self.require_object_text()
        features = {
            name: norm(maps)
            for norm, (name, maps) in zip(self.norms, self.backbone(batch.tensors).items(), strict=True)
        }
        maps, proposals = list(features.values()), self.proposals
        trunk = proposals.trunk(maps[1:])
        dense = proposals.main(trunk, self.strides[1:], self.object_text)
        auxiliary = proposals.auxiliary(trunk, self.strides[1:], self.object_text) if step is not None else None
        candidates = proposals.candidates(dense, [m.shape[2] * m.shape[3] for m in trunk])
        table = SamplingTable(maps[:-1], self.strides[:-1])
        start = proposals.choose(candidates, self.config.decoder.queries)
        content, xyzr, deltas = proposals.content(table, start), to_xyzr(start), start
        contents, boxes = [], []
        for stage in self.stages:
            content, moved, deltas = stage(table, content, xyzr)
            contents.append(content)
            boxes.append(to_corners(moved))
            xyzr = moved.detach()  # arXiv 2203.16507, section 3.4
        return AdaMixerOutput(features, candidates, contents, boxes, deltas, auxiliary)

    def own_losses(self, look: ForwardOutput, step: Step, paired: Tensor) -> dict[str, Tensor]:
        """Those of the proposals' two heads."""
        assert isinstance(look, AdaMixerOutput)
        assert look.auxiliary is not None
        config, boxes = self.config.proposals, step.boxes
        main = main_losses(look.candidates, boxes.objects, boxes.is_object, paired, config)
        shapes = [m.shape[-2:] for m in list(look.features.values())[1:]]
        centres, valid = valid_positions(shapes, self.strides[1:], boxes.sizes)
        auxiliary = auxiliary_losses(look.auxiliary, centres, valid, boxes.objects, boxes.is_object, config)
        return dict(zip(("rpn_cls", "rpn_box", "rpn_aux_cls", "rpn_aux_box"), (*main, *auxiliary), strict=True))
