"""RT-DETR (arXiv 2304.08069), with text embeddings in place of classes and the distillation of queries (METHOD section
12).

A training step waits for the device twice: for the sides of the pseudo boxes, and for the costs that candidates,
queries and boxes are paired by. N pictures, Q queries of each, M slots of the denoising, S stages, C channels.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import RTDETRConfig
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.modeling.backbones.pyramid import build_backbone, without_pyramid
from hdovd.modeling.distributed import divisor
from hdovd.modeling.queries.detector import ForwardOutput, QueryDetector, QueryStage, Step
from hdovd.modeling.queries.pairs import Pairs, StepBoxes
from hdovd.modeling.rtdetr.decoder import Extra, Network, logit
from hdovd.modeling.rtdetr.losses import Noised, box_rows, candidate_losses, noised, varifocal_rows

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
        super().__init__()
        if not isinstance(recipe.detector, RTDETRConfig):
            raise HdovdError(
                f"detector.name = {recipe.detector.name!r}: this detector needs a recipe with detector.name = 'rtdetr'"
            )
        config = recipe.detector
        self.recipe, self.dim, self.config = recipe, dim, config
        self.backbone = build_backbone(config.backbone, initialise)
        self.network = Network(config, without_pyramid(self.backbone), dim)
        self.denoising = nn.Linear(dim, config.backbone.fpn_channels) if config.denoising.queries else None
        self.finish(recipe, dim, config)

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
        extra = None if slots is None or step is None else self._extra(slots, step, queries)
        found = self.network(maps, sizes, whole, self.object_text, extra)
        denoised = [(c[:, queries:], b[:, queries:]) for c, b in zip(found.contents, found.boxes, strict=True)]
        return RTDETROutput(
            found.features,
            found.candidates,
            [content[:, :queries] for content in found.contents],
            [boxes[:, :queries] for boxes in found.boxes],
            found.deltas,
            slots,
            denoised,
        )

    def _extra(self, slots: Noised, step: Step, queries: int) -> Extra:
        assert self.denoising is not None
        content = self.denoising(step.prompts.detach()[slots.prompt])
        return Extra(content, logit(slots.boxes), slots.seen(queries))

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
        objects = divisor(step.boxes.is_object.sum())
        losses = candidate_losses(look.candidates, step.boxes, paired, objects)
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
