"""RT-DETR (arXiv 2304.08069), with text embeddings in place of classes and the distillation of queries (METHOD section
12).

It is trained by what all queries are, by IoU-aware objectness of stages and candidates, and by contrastive denoising
(arXiv 2203.03605, section 3.3), queries that start from boxes with noise and are to find them. A group of denoising
holds each box of the picture twice: near it, and so far away that there is no object to be found. What a query knows of
its box's class is the class's text, of a pseudo box its u: a linear layer makes its content of that. A picture has as
many groups as `queries` allow, at least one; the losses are means over its groups, so that they do not depend on the
rest of the batch. Neither other groups nor the chosen queries see a group.

A training step waits for the device twice: for the sides of the pseudo boxes, and for the costs that candidates,
queries and boxes are paired by. N pictures, Q queries of each, M candidates, or slots of the denoising, H objects of a
picture, padded, G boxes of the batch, S stages, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import DenoisingConfig, RTDETRConfig
from hdovd.config.recipe import Recipe
from hdovd.modeling.backbones.pyramid import build_backbone, without_pyramid
from hdovd.modeling.batching import Use, image_generator
from hdovd.modeling.boxes import overlap, taken
from hdovd.modeling.distributed import divisor
from hdovd.modeling.queries.detector import ForwardOutput, QueryDetector, QueryStage, Step
from hdovd.modeling.queries.pairs import NONE, Candidates, Pairs, StepBoxes
from hdovd.modeling.rtdetr.network import Network, logit, to_shares

ALPHA, GAMMA = 0.75, 2.0  # arXiv 2008.13367, section 4.1
TINY = 1e-7  # of a probability, before its logarithm is taken


def varifocal_rows(probability: Tensor, quality: Tensor) -> Tensor:
    """Varifocal loss (arXiv 2008.13367): q BCE(p, q) where there is an object of quality q, else alpha p^gamma BCE(p,
    0); any shape, float32.
    """
    weight = torch.where(quality > 0, quality, ALPHA * probability.detach() ** GAMMA)
    sure = probability.clamp(TINY, 1 - TINY)  # torch's own function stops at what is no number, before training says it
    return -weight * (quality * sure.log() + (1 - quality) * (1 - sure).log())


def box_rows(found: Tensor, wanted: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 in sides of the picture, 1 - GIoU, and IoU of boxes (..., 4) xyxy with sizes (..., 2) of their pictures."""
    iou, giou = overlap(found, wanted)
    return ((found - wanted).abs() / sizes.flip(-1).tile(2)).sum(dim=-1), 1 - giou, iou


def candidate_losses(found: Candidates, boxes: StepBoxes, paired: Tensor, count: Tensor) -> list[Tensor]:
    """Varifocal loss, L1 and GIoU loss of candidates, one to one with objects; sums over `count`.

    Args:
        paired: (N, H) int64, the candidate of each object or NONE.
    """
    is_paired, row = paired != NONE, paired.clamp(min=0)
    far, apart, iou = box_rows(taken(found.boxes, row), boxes.objects, boxes.sizes[:, None])
    slots = found.probability.shape[1]
    quality = found.probability.new_zeros(len(row), slots + 1)  # one past the last is nobody's
    quality = quality.scatter(1, torch.where(is_paired, row, slots), iou.detach().clamp(min=0))[:, :slots]
    rows = varifocal_rows(found.probability, quality) * found.distinct
    return [rows.sum() / count, (far * is_paired).sum() / count, (apart * is_paired).sum() / count]


# --- denoising ---

CHOSEN, NOBODY = -1, -2  # groups: of the chosen queries, of slots that hold no box


@dataclass(frozen=True, slots=True)
class Noised:
    """box (N, M) int64: the box of each slot in 0..G-1, 0 where there is none. positive (N, M) bool: near its box.
    group (N, M) int64. share (N, M): 1 by the groups of the picture, 0 where there is none.
    boxes (N, M, 4): centre and sides, in sides of the picture. prompt (N, M) int64: which text the content is made of.
    """

    box: Tensor
    positive: Tensor
    group: Tensor
    share: Tensor
    boxes: Tensor
    prompt: Tensor

    @property
    def real(self) -> Tensor:
        """(N, M) bool: slots with a box."""
        return self.group != NOBODY

    def seen(self, queries: int) -> Tensor:
        """(N, Q + M, Q + M) bool: who looks at whom, chosen queries first."""
        group = F.pad(self.group, (queries, 0), value=CHOSEN)
        return (group[:, :, None] == group[:, None]) | (group[:, None] == CHOSEN)


def noised(step: Step, config: DenoisingConfig) -> Noised | None:
    """The slots of a step, drawn by each picture's key; None if there is no box."""
    boxes, classes = step.boxes, step.classes
    if not len(boxes.boxes):
        return None
    numbers, draws = _layout(boxes, step.keys, config.queries, boxes.boxes.device)
    box, group, negative, groups = numbers.unbind(-1)
    sizes = boxes.sizes[:, None].expand(*box.shape, 2)
    own = boxes.boxes[box]
    half = (own[..., 2:] - own[..., :2]).tile(2) / 2
    away = 2 * draws[..., :4] - 1
    far = away + torch.where(away < 0, -1.0, 1.0) * negative[..., None]
    moved = torch.minimum((own + far * half * config.box_noise).clamp(min=0), sizes.flip(-1).tile(2))
    corners = moved.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(-2)
    other = (draws[..., 5] * classes).long().clamp(max=classes - 1)
    prompt = torch.where(draws[..., 4] < config.label_noise, other, step.labels[box])
    real = group != NOBODY
    return Noised(box, real & (negative == 0), group, real / groups.clamp(min=1), to_shares(corners, sizes), prompt)


def _layout(boxes: StepBoxes, keys: Sequence[int | None], queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, M, 4) int64, box, group, whether too far, and the picture's groups; (N, M, 6) draws in 0..1. Made on the
    host, with one transfer each."""
    numbers, draws, first = [], [], 0
    for key, count in zip(keys, map(sum, zip(boxes.base, boxes.pseudo, strict=True)), strict=True):
        groups = max(queries // max(count, 1), 1)
        of_group, negative, box = torch.meshgrid(
            torch.arange(groups), torch.arange(2), torch.arange(first, first + count), indexing="ij"
        )
        rows = torch.stack([box, of_group, negative, torch.full_like(box, groups)], dim=-1).flatten(0, 2)
        numbers.append(rows)
        draws.append(torch.rand(len(rows), 6, generator=image_generator(key, Use.NOISE)))
        first += count
    padded = pad_sequence(numbers, batch_first=True)
    lengths = torch.tensor([len(rows) for rows in numbers])
    padded[..., 1].masked_fill_(torch.arange(padded.shape[1]) >= lengths[:, None], NOBODY)
    return padded.to(device, non_blocking=True), pad_sequence(draws, batch_first=True).to(device, non_blocking=True)


# --- the detector ---

SELECTION = ("selection_objectness", "selection_box", "selection_giou")
DENOISING = ("denoising_classification", "denoising_objectness", "denoising_box", "denoising_giou")


@dataclass(frozen=True, slots=True)
class RTDETROutput(ForwardOutput):
    """What denoising started from, None where nobody asked or there is no box; and what came of it after each stage:
    contents (N, M, C), boxes (N, M, 4) xyxy pixels.
    """

    noised: Noised | None
    denoised: list[tuple[Tensor, Tensor]]


class RTDETR(QueryDetector):
    """The real-time detector: backbone, hybrid encoder, stages of deformable attention, adapters, levels. It needs no
    NMS: its scores are multiplied by the probability that there is an object of which no other query is surer.
    """

    training_parts = ("denoising.", "instance_level.", "text_level.", "image_level.", "extra.")
    exportable = "hdovd.modeling.export.detectors:ExportableDetector"
    suppresses = False
    config: RTDETRConfig

    def __init__(self, recipe: Recipe, dim: int, initialise: bool = True) -> None:
        super().__init__(recipe, dim, "rtdetr")
        config = self.config
        self.backbone = build_backbone(config.backbone, initialise)
        self.network = Network(config, without_pyramid(self.backbone), dim)
        self.denoising = nn.Linear(dim, config.backbone.fpn_channels) if config.denoising.queries else None
        self.finish()

    def stage(self, number: int) -> QueryStage:
        return cast(QueryStage, self.network.stages[number])

    def find(self, batch: ImageList, step: Step | None = None) -> RTDETROutput:
        self.require_object_text()
        device = batch.tensors.device
        sizes = torch.as_tensor(batch.image_sizes, dtype=torch.float32).to(device, non_blocking=True)
        whole = torch._shape_as_tensor(batch.tensors)[2:].to(device, torch.float32, non_blocking=True)
        maps = self.backbone(batch.tensors)
        slots = None if step is None or self.denoising is None else noised(step, self.config.denoising)
        queries = min(self.config.decoder.queries, sum(m.shape[2] * m.shape[3] for m in maps.values()))
        extra = None
        if slots is not None and step is not None and self.denoising is not None:
            extra = self.denoising(step.prompts.detach()[slots.prompt]), logit(slots.boxes), slots.seen(queries)
        found = self.network(maps, sizes, whole, self.object_text, extra)
        return RTDETROutput(
            found.features,
            found.candidates,
            [content[:, :queries] for content in found.contents],
            [boxes[:, :queries] for boxes in found.boxes],
            found.deltas,
            slots,
            [(c[:, queries:], b[:, queries:]) for c, b in zip(found.contents, found.boxes, strict=True)],
        )

    def objectness_of(self, logits: Tensor, pairs: Pairs, boxes: StepBoxes, count: Tensor) -> Tensor:
        """Varifocal: a query with a box is an object as far as it overlaps with it (arXiv 2304.08069, section 4.3)."""
        quality = pairs.to_queries(pairs.own_iou.detach().clamp(min=0), 0.0)
        return varifocal_rows(logits.sigmoid(), quality).sum() / count

    def certainty(self, look: ForwardOutput) -> Tensor:
        return self.stage(-1).object_logits(look.contents[-1]).flatten().sigmoid()

    def own_losses(self, look: ForwardOutput, step: Step, paired: Tensor) -> dict[str, Tensor]:
        """Those of the candidates, which are trained on base boxes and all pseudo boxes, and of denoising."""
        assert isinstance(look, RTDETROutput)
        config = self.config.loss
        weights = (config.objectness, config.box, config.giou)
        losses = candidate_losses(look.candidates, step.boxes, paired, divisor(step.boxes.is_object.sum()))
        named = {name: weight * loss for name, weight, loss in zip(SELECTION, weights, losses, strict=True)}
        if self.denoising is not None:
            named |= self._denoising_losses(look, step, divisor(step.boxes.is_base.sum()))
        return named

    def _denoising_losses(self, look: RTDETROutput, step: Step, count: Tensor) -> dict[str, Tensor]:
        """Like those of the stages, but it is known which query is which box's; means over a picture's groups."""
        slots, config, boxes = look.noised, self.config.loss, step.boxes
        if slots is None:
            return {name: count.new_zeros(()) for name in DENOISING}
        contents, found = zip(*look.denoised, strict=True)
        c, logits = self.read(contents)
        far, apart, iou = box_rows(torch.stack(found), boxes.boxes[slots.box], boxes.sizes[:, None])
        trust = torch.where(slots.positive, boxes.weights[slots.box], config.unmatched_weight * slots.real)
        wanted = torch.where(slots.positive, step.labels[slots.box], step.background)
        stages = len(contents)
        quality = iou.detach().clamp(min=0) * slots.positive
        of_base = slots.share * slots.positive * boxes.is_base[slots.box]
        losses = (
            self.classification(
                self.adapters.classified(c),
                wanted.expand(stages, -1, -1),
                (trust * slots.share).expand(stages, -1, -1),
                step,
                count,
            ),
            config.objectness * (varifocal_rows(logits.sigmoid(), quality) * slots.share).sum() / count,
            config.box * (far * of_base).sum() / count,
            config.giou * (apart * of_base).sum() / count,
        )
        return dict(zip(DENOISING, losses, strict=True))
