"""AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as HD-OVD distils into it (2503.10152; METHOD section 11).

Built by `detectors`. A training step waits for the device three times: for the sides of the pseudo boxes, for the proposals' NMS, and
for the costs that queries and boxes are paired by.
N pictures, Q queries of each, S stages, C channels, D embedding size, K base classes, G boxes of the batch (`boxes_of_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from hdovd.config.recipe import Recipe
from hdovd.data.targets import Targets, scale_all
from hdovd.modeling.adamixer.boxes_of_step import StepBoxes, boxes_of_step
from hdovd.modeling.adamixer.instance_level import InstanceLevels
from hdovd.modeling.adamixer.matching import pair_candidates, pair_stages, pairing_costs, to_host
from hdovd.modeling.adamixer.network import AdaMixerNetwork, ForwardOutput, mean_text
from hdovd.modeling.adamixer.pairs import Pairs
from hdovd.modeling.adamixer.proposal_loss import auxiliary_losses, main_losses, valid_positions
from hdovd.modeling.adamixer.stage_losses import box_losses, classification_loss, objectness_loss, prompts_and_labels, query_weights
from hdovd.modeling.adamixer.text_level import TextLevel
from hdovd.modeling.base import Students
from hdovd.modeling.batching import batch_images, draw_short_sides
from hdovd.modeling.distributed import divisor
from hdovd.modeling.extra_losses import ExtraLosses
from hdovd.modeling.levels.imagewise import ImageLevel
from hdovd.modeling.losses.classwise import cosine_logits
from hdovd.modeling.sampling import keys_of
from hdovd.modeling.step_context import StepContext

LEAST_PROBABILITY = 1e-5  # of a candidate, and 1 less it the most, in the cost of pairing it; released code


class AdaMixer(AdaMixerNetwork):
    """The query-based detector with its losses.

    Without a text embedding of "object" (`set_object_text`) the mean of the base classes' is taken in the first training step, and
    `log` says so.
    """

    training_parts = ("proposals.auxiliary.", "instance_level.", "text_level.", "image_level.", "extra.")
    exportable = "hdovd.modeling.export.detectors:ExportableAdaMixer"
    has_idle_parameters = True  # before `pseudo_boxes.from_epoch`: the adapter of the text level, and the image level

    def __init__(self, recipe: Recipe, dim: int, log: Callable[[str], None] | None) -> None:
        super().__init__(recipe, dim, log)
        loss, backbone, stages = recipe.loss, self.config.backbone, self.config.decoder.stages
        self.instance_level = InstanceLevels(loss.instance, stages, dim) if loss.instance.enabled else None
        self.text_level = TextLevel(self.config.text, stages, dim) if loss.class_.enabled else None
        self.image_level = ImageLevel(loss.image, backbone.levels, backbone.fpn_channels, dim) if loss.image.enabled else None
        self.extra = ExtraLosses(loss.extra, dim, backbone.fpn_channels)
        self.distils = True

    def begin_epoch(self, epoch: int) -> None:
        """The stages see pseudo boxes, and the levels distil, from the recipe's epoch on. The proposals see pseudo boxes in all epochs
        (released code)."""
        self.distils = epoch >= self.recipe.pseudo_boxes.from_epoch

    def forward(self, images: list[Tensor], targets: list[Targets], texts: Tensor,
                keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The weighted losses of one batch, by name, summed over stages; with several processes those of the global batch in the mean.

        Args:
            images: (3, h, w) uint8 RGB each. targets: one an image, in its pixels.
            texts: (K, D) text embeddings of the base classes.
            keys: a whole number below 2**63 an image, which decides its scale; nothing else is drawn. None: torch's global generator.

        Raises HdovdError for keys that do not fit.
        """
        if not self.knows_objects:
            self.set_object_text(mean_text(texts))
            if self.log is not None:
                self.log("adamixer: no text embedding of \"object\" was given; the mean of the base classes' texts stands in for it")
        batch, boxes = self._batch(images, targets, keys)
        look = self.look(batch.tensors, with_auxiliary=True)
        c = torch.stack([self.stage(s).describe(content) for s, content in enumerate(look.contents)])
        logits = torch.stack([self.stage(s).object_logits(content) for s, content in enumerate(look.contents)])
        pairs, paired = self._pair(look, logits, boxes)
        classified = self.adapters.classified(c)
        losses = self._proposal_losses(look, boxes, paired)
        losses |= self._stage_losses(look, logits, classified, pairs, boxes, texts)
        view = _view(look, batch, boxes, pairs, texts, c if self.instance_level is not None else None, classified)
        losses |= self._distillation(view, c, pairs, boxes)
        losses.update(self.extra(view))
        return losses

    @torch.inference_mode()
    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        """The last stage's student embeddings, as `forward` makes them for the instance level; no loss, and no memory changes.

        Raises ValueError if the recipe does without the instance level.
        """
        if self.instance_level is None:
            raise ValueError("a detector without the instance level has no student embeddings")
        batch, boxes = self._batch(images, targets, keys)
        look = self.look(batch.tensors, with_auxiliary=False)
        last = look.contents[-1]
        everything = torch.stack([self.stage(s).object_logits(content) for s, content in enumerate(look.contents)])
        pairs, _ = self._pair(look, everything, boxes)
        q, box = pairs.students(self.stage(-1).describe(last)[None].expand(len(look.contents), -1, -1, -1))[-1]
        order = box.argsort()
        return Students(q[order], box[order], boxes.targets)

    def _batch(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None) -> tuple[ImageList, StepBoxes]:
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        scaled = scale_all(targets, factors)
        return batch, boxes_of_step(scaled, batch.image_sizes, self.recipe.pseudo_boxes, self.recipe.loss.class_, with_pseudo=self.distils)

    def _pair(self, look: ForwardOutput, logits: Tensor, boxes: StepBoxes) -> tuple[Pairs, Tensor]:
        """Which query is which box's at each stage; and the candidate (N, H) of each object, or -1. One transfer each way."""
        costs = self.config.matching
        found = look.candidates
        probability = found.probability.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        of_candidates, _ = pairing_costs(probability, found.boxes, boxes.objects, boxes.sizes, costs)
        of_stages, iou = pairing_costs(logits.sigmoid(), torch.stack(look.boxes), boxes.padded, boxes.sizes, costs)
        on_host = to_host([of_candidates, found.distinct, of_stages, iou])
        paired = pair_candidates(on_host[0], on_host[1], boxes.object_counts)
        query = pair_stages(on_host[2], boxes)
        both = torch.cat([torch.from_numpy(paired).flatten(), torch.from_numpy(query).flatten()]).to(logits.device, non_blocking=True)
        first, second = both.split([paired.size, query.size])
        return Pairs.of(query, second.view(query.shape), on_host[3], iou, boxes), first.view(paired.shape)

    def _proposal_losses(self, look: ForwardOutput, boxes: StepBoxes, paired: Tensor) -> dict[str, Tensor]:
        assert look.auxiliary is not None
        config = self.config.proposals
        main = main_losses(look.candidates, boxes.objects, boxes.is_object, paired, config)
        shapes = [m.shape[-2:] for m in list(look.features.values())[1:]]
        centres, valid = valid_positions(shapes, self.strides[1:], boxes.sizes)
        auxiliary = auxiliary_losses(look.auxiliary, centres, valid, boxes.objects, boxes.is_object, config)
        return dict(zip(("rpn_cls", "rpn_box", "rpn_aux_cls", "rpn_aux_box"), (*main, *auxiliary), strict=True))

    def _stage_losses(self, look: ForwardOutput, logits: Tensor, classified: Tensor, pairs: Pairs, boxes: StepBoxes,
                      texts: Tensor) -> dict[str, Tensor]:
        weights = self.config.loss
        count = divisor(boxes.is_base.sum())
        prompts, labels = prompts_and_labels(boxes, texts, self.background, with_pseudo=self.recipe.loss.class_.enabled)
        scores = cosine_logits(classified.flatten(0, 2), prompts, self.config.decoder.logit_scale)
        wanted = pairs.to_queries(labels, len(prompts) - 1)
        far, apart = box_losses(torch.stack(look.boxes), pairs, boxes, count)
        is_object = pairs.to_queries(torch.ones_like(boxes.weights), 0.0)
        return {"classification": weights.classification * classification_loss(scores, wanted, query_weights(pairs, boxes, weights), count),
                "objectness": weights.objectness * objectness_loss(logits, is_object, count),
                "box": weights.box * far, "giou": weights.giou * apart}

    def _distillation(self, view: StepContext, c: Tensor, pairs: Pairs, boxes: StepBoxes) -> dict[str, Tensor]:
        """The levels' losses; zero before their first epoch, so that a log has the same columns throughout."""
        losses: dict[str, Tensor] = {}
        if not self.distils:
            names = {"instance_alignment": self.instance_level, "instance_relation": self.instance_level,
                     "text_alignment": self.text_level, "text_relation": self.text_level, "image_alignment": self.image_level}
            return {name: c.new_zeros(()) for name, level in names.items() if level is not None}
        if self.instance_level is not None:
            students = pairs.students(c)
            losses |= self.instance_level([q for q, _ in students], [boxes.embeddings[box] for _, box in students])
        if self.text_level is not None:
            base, pseudo = pairs.in_text_space(c, self.adapters.distilled, boxes)
            losses |= self.text_level(base, pseudo, torch.cat([t.labels for t in boxes.targets]), view.texts)
        if self.image_level is not None:
            losses.update(self.image_level(view))
        return losses


def _view(look: ForwardOutput, batch: ImageList, boxes: StepBoxes, pairs: Pairs, texts: Tensor, c: Tensor | None,
          classified: Tensor) -> StepContext:
    """The step as losses of the recipe's own see it: the last stage's queries are the RoIs."""
    box_of_query = pairs.to_queries(torch.arange(len(boxes.boxes), device=texts.device), -1)[-1].flatten()
    d = None if c is None else c[-1].flatten(0, 1)[pairs.paired_queries(-1)]
    return StepContext(look.features, batch.image_sizes, boxes.targets, texts, list(look.boxes[-1].detach()), box_of_query,
                    look.deltas.flatten(0, 1), classified[-1].flatten(0, 1), d)
