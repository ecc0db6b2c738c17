"""AdaMixer (arXiv 2203.16507) with distinct queries (2303.12776), as HD-OVD distils into it (2503.10152; METHOD section
11).

A training step waits for the device three times: for the sides of the pseudo boxes, for the proposals' NMS, and for the
costs that queries and boxes are paired by. N pictures, Q queries of each, S stages, C channels, D embedding size, H
hidden, K classes, G boxes of the batch (`pairs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.adamixer import GROUPS_OF_NORM, AdaMixerConfig
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.data.targets import Targets, scale_all
from hdovd.modeling.adamixer.boxes import SamplingTable, to_corners, to_xyzr
from hdovd.modeling.adamixer.decoder import DecoderStage
from hdovd.modeling.adamixer.levels import InstanceLevels, TextLevel
from hdovd.modeling.adamixer.losses import (
    auxiliary_losses,
    box_losses,
    classification_loss,
    main_losses,
    objectness_loss,
    prompts_and_labels,
    query_weights,
    valid_positions,
)
from hdovd.modeling.adamixer.pairs import (
    Pairs,
    StepBoxes,
    boxes_of_step,
    pair_candidates,
    pair_stages,
    pairing_costs,
    to_host,
)
from hdovd.modeling.adamixer.proposals import Candidates, DensePredictions, QueryProposals
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.base import Detector, ExtraLosses, RoIPredictions, StepContext, Students
from hdovd.modeling.batching import batch_images, draw_short_sides, keys_of
from hdovd.modeling.distributed import divisor
from hdovd.modeling.levels.imagewise import ImageLevel
from hdovd.modeling.losses.classwise import cosine_logits, of_judged, with_one_background

LEAST_PROBABILITY = 1e-5  # of a candidate, and 1 less it the most, in the cost of pairing it; released code


class TextAdapters(nn.Module):
    """`classified` is what the classifier compares with its prompts; `distilled` what the losses in text space are
    about.

    The second one's weights are made of the last ones of the first, which learn nothing by it. It starts as the
    identity.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.visual_to_text = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.transfer = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for start in self.transfer[-1].parameters():
            nn.init.zeros_(start)

    def classified(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        moved: Tensor = self.visual_to_text(c)
        return c + moved.float()

    def distilled(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        last = self.visual_to_text[-1]
        assert isinstance(last, nn.Linear)
        with torch.autocast(c.device.type, enabled=False):
            moved: Tensor = c @ self.transfer(last.weight.detach()).T
            return c + moved


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What the network finds in a batch.

    features: pyramid maps by level name, normalised. candidates, auxiliary (None where nobody asked): what the
    proposals found. contents: (N, Q, C) after each stage. boxes: (N, Q, 4) xyxy pixels of the padded batch, after each
    stage; each has the gradient of its own stage's deltas alone. deltas: (N, Q, 4) of the last stage.
    """

    features: dict[str, Tensor]
    candidates: Candidates
    auxiliary: DensePredictions | None
    contents: list[Tensor]
    boxes: list[Tensor]
    deltas: Tensor


class AdaMixer(Detector):
    """The query-based detector with its losses: backbone, proposals, stages, adapters, levels.

    It knows objects by the text embedding of the word "object", which it keeps (`set_object_text`). Without one, the
    mean of the base classes' embeddings is taken in the first training step, and logged.
    """

    training_parts = ("proposals.auxiliary.", "instance_level.", "text_level.", "image_level.", "extra.")
    exportable = "hdovd.modeling.export.detectors:ExportableAdaMixer"
    knows_backgrounds = True
    has_idle_parameters = True  # before `pseudo_boxes.from_epoch`: the adapter of the text level, and the image level

    def __init__(self, recipe: Recipe, dim: int, initialise: bool = True) -> None:
        super().__init__()
        if not isinstance(recipe.detector, AdaMixerConfig):
            raise HdovdError(
                f"detector.name = {recipe.detector.name!r}: this detector needs a recipe with detector.name = "
                f"'adamixer'"
            )
        config = recipe.detector
        self.recipe, self.dim, self.config = recipe, dim, config
        channels, levels = config.backbone.fpn_channels, config.backbone.levels
        self.strides = [2**level for level in (*levels, levels[-1] + 1)]
        pyramid = build_backbone(config.backbone, initialise)
        self.backbone = pyramid
        for conv in pyramid.fpn.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS_OF_NORM, channels) for _ in self.strides)
        self.proposals = QueryProposals(config.proposals, channels, dim, len(levels))
        self.stages = nn.ModuleList(DecoderStage(config.decoder, channels, dim) for _ in range(config.decoder.stages))
        self.adapters = TextAdapters(dim, config.decoder.adapter_channels)
        self.background = nn.Parameter(torch.randn(1, dim))
        self.object_text: Tensor
        self.register_buffer("object_text", torch.zeros(dim))
        self.knows_objects = False
        self.register_load_state_dict_post_hook(AdaMixer._see_object_text)
        loss, stages = recipe.loss, config.decoder.stages
        self.instance_level = InstanceLevels(loss.instance, stages, dim) if loss.instance.enabled else None
        self.text_level = TextLevel(config.text, stages, dim) if loss.class_.enabled else None
        self.image_level = ImageLevel(loss.image, levels, channels, dim) if loss.image.enabled else None
        self.extra = ExtraLosses(loss.extra, dim, channels)
        self.distils = True

    @staticmethod
    def _see_object_text(module: nn.Module, _: object) -> None:
        assert isinstance(module, AdaMixer)
        module.knows_objects = bool(module.object_text.any())

    def set_object_text(self, row: Tensor) -> None:
        """(D,) the text embedding of "object", which the proposals are measured against; it is in the checkpoint."""
        self.object_text.copy_(row.detach())
        self.knows_objects = bool(row.any())

    def stage(self, number: int) -> DecoderStage:
        stage = self.stages[number]
        assert isinstance(stage, DecoderStage)
        return stage

    def look(self, pixels: Tensor, *, with_auxiliary: bool) -> ForwardOutput:
        """Run a padded batch (N, 3, H, W) through the network. Raises HdovdError if the text of "object" is not
        known."""
        if not self.knows_objects:
            raise HdovdError(
                'this AdaMixer was not trained and was given no text embedding of "object" (set_object_text)'
            )
        features = {
            name: norm(maps) for norm, (name, maps) in zip(self.norms, self.backbone(pixels).items(), strict=True)
        }
        maps, proposals = list(features.values()), self.proposals
        trunk = proposals.trunk(maps[1:])
        dense = proposals.main(trunk, self.strides[1:], self.object_text)
        auxiliary = proposals.auxiliary(trunk, self.strides[1:], self.object_text) if with_auxiliary else None
        candidates = proposals.candidates(dense, [m.shape[2] * m.shape[3] for m in trunk])
        table = SamplingTable(maps[:-1], self.strides[:-1])
        start = proposals.choose(candidates, self.config.decoder.queries)
        content, xyzr, deltas = proposals.content(table, start), to_xyzr(start), start
        contents, boxes = [], []
        for number in range(len(self.stages)):
            content, moved, deltas = self.stage(number)(table, content, xyzr)
            contents.append(content)
            boxes.append(to_corners(moved))
            xyzr = moved.detach()  # arXiv 2203.16507, section 3.4
        return ForwardOutput(features, candidates, auxiliary, contents, boxes, deltas)

    @torch.inference_mode()
    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        """The last stage's queries of every image, with their scores for any classes (METHOD section 7).

        s2 is a softmax over the classes here. Objectness takes no part, and boxes are not clipped to the image
        (released code).

        Args:
            images: (3, h, w) uint8 RGB each. texts: (K, D) text embeddings of the classes asked for.
        """
        batch, factors = batch_images(images, self.recipe.input)
        look = self.look(batch.tensors, with_auxiliary=False)
        c = self.stage(-1).describe(look.contents[-1]).flatten(0, 1)
        d = self.adapters.distilled(c) if self.recipe.loss.uses_pseudo_boxes else None  # else no level teaches it
        s1, s2 = query_scores(
            self.adapters.classified(c),
            d,
            texts.to(self.background),
            self.backgrounds(self.background),
            self.config.decoder.logit_scale,
            self.recipe.inference.distillation_scale,
        )
        queries = look.boxes[-1].shape[1]
        seconds = [None] * len(images) if s2 is None else s2.split(queries)
        return [
            RoIPredictions(boxes / boxes.new_tensor([*factor, *factor]), one, two)
            for boxes, factor, one, two in zip(look.boxes[-1], factors, s1.split(queries), seconds, strict=True)
        ]

    def begin_epoch(self, epoch: int) -> None:
        """The stages see pseudo boxes, and the levels distil, from the recipe's epoch on. The proposals see pseudo
        boxes in all epochs (released code).
        """
        self.distils = epoch >= self.recipe.pseudo_boxes.from_epoch

    def forward(
        self, images: list[Tensor], targets: list[Targets], texts: Tensor, keys: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses of one batch, by name, summed over stages; with several processes those of the global
        batch in the mean.

        Args:
            images: (3, h, w) uint8 RGB each. targets: one an image, in its pixels.
            texts: (K, D) text embeddings of the base classes.
            keys: a whole number below 2**63 an image, which decides its scale; nothing else is drawn. None: torch's
            global generator.

        Raises HdovdError for keys that do not fit.
        """
        if not self.knows_objects:
            self.set_object_text(mean_text(texts))
            log(
                'adamixer: no text embedding of "object" was given; the mean of the base classes\' texts '
                "stands in for it"
            )
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
        """The last stage's student embeddings, as `forward` makes them for the instance level; no loss, and no memory
        changes.

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

    def _batch(
        self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None
    ) -> tuple[ImageList, StepBoxes]:
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        scaled = scale_all(targets, factors)
        return batch, boxes_of_step(
            scaled, batch.image_sizes, self.recipe.pseudo_boxes, self.recipe.loss.class_, with_pseudo=self.distils
        )

    def _pair(self, look: ForwardOutput, logits: Tensor, boxes: StepBoxes) -> tuple[Pairs, Tensor]:
        """Which query is which box's at each stage; and the candidate (N, H) of each object, or -1. One transfer each
        way.
        """
        costs = self.config.matching
        found = look.candidates
        probability = found.probability.clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        of_candidates, _ = pairing_costs(probability, found.boxes, boxes.objects, boxes.sizes, costs)
        of_stages, iou = pairing_costs(logits.sigmoid(), torch.stack(look.boxes), boxes.padded, boxes.sizes, costs)
        on_host = to_host([of_candidates, found.distinct, of_stages, iou])
        paired = pair_candidates(on_host[0], on_host[1], boxes.object_counts)
        query = pair_stages(on_host[2], boxes)
        both = torch.cat([torch.from_numpy(paired).flatten(), torch.from_numpy(query).flatten()]).to(
            logits.device, non_blocking=True
        )
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

    def _stage_losses(
        self, look: ForwardOutput, logits: Tensor, classified: Tensor, pairs: Pairs, boxes: StepBoxes, texts: Tensor
    ) -> dict[str, Tensor]:
        weights = self.config.loss
        count = divisor(boxes.is_base.sum())
        backgrounds = self.backgrounds(self.background)
        prompts, labels = prompts_and_labels(boxes, texts, backgrounds, with_pseudo=self.recipe.loss.class_.enabled)
        scores = cosine_logits(classified.flatten(0, 2), prompts, self.config.decoder.logit_scale)
        scores = with_one_background(scores, len(backgrounds))
        wanted = pairs.to_queries(labels, len(prompts) - len(backgrounds))
        if self.recipe.loss.class_.federated:
            image = torch.arange(wanted.shape[1], device=wanted.device).view(1, -1, 1).expand_as(wanted).flatten()
            is_background = wanted.flatten() == len(prompts) - len(backgrounds)
            scores = of_judged(scores, [t.judged for t in boxes.targets], image, is_background)
        far, apart = box_losses(torch.stack(look.boxes), pairs, boxes, count)
        is_object = pairs.to_queries(torch.ones_like(boxes.weights), 0.0)
        return {
            "classification": weights.classification
            * classification_loss(scores, wanted, query_weights(pairs, boxes, weights), count),
            "objectness": weights.objectness * objectness_loss(logits, is_object, count),
            "box": weights.box * far,
            "giou": weights.giou * apart,
        }

    def _distillation(self, view: StepContext, c: Tensor, pairs: Pairs, boxes: StepBoxes) -> dict[str, Tensor]:
        """The levels' losses; zero before their first epoch, so that a log has the same columns throughout."""
        losses: dict[str, Tensor] = {}
        if not self.distils:
            names = {
                "instance_alignment": self.instance_level,
                "instance_relation": self.instance_level,
                "text_alignment": self.text_level,
                "text_relation": self.text_level,
                "image_alignment": self.image_level,
            }
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


def query_scores(
    c: Tensor, d: Tensor | None, texts: Tensor, backgrounds: Tensor, logit_scale: float, distillation_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Scores of queries for any classes (METHOD section 7); both are a softmax over the classes (released code).

    Args:
        c, d: (Q, D) class features in text space, as the classifier and, if a level teaches it, as the distillation
        moves them. texts: (K, D) of the classes. backgrounds: (B + 1, D).

    Returns:
        Probabilities (Q, K + 1), the last of the background; and (Q, K), or None.
    """
    logits = cosine_logits(c, torch.cat([texts, backgrounds]), logit_scale)
    first = with_one_background(logits, len(backgrounds)).softmax(dim=1)
    return first, None if d is None else cosine_logits(d, texts, distillation_scale).softmax(dim=1)


def mean_text(texts: Tensor) -> Tensor:
    """What stands in for the text of "object": the mean direction (D,) of class texts (K, D)."""
    return F.normalize(F.normalize(texts.float(), dim=1).mean(dim=0), dim=0)


def _view(
    look: ForwardOutput,
    batch: ImageList,
    boxes: StepBoxes,
    pairs: Pairs,
    texts: Tensor,
    c: Tensor | None,
    classified: Tensor,
) -> StepContext:
    """The step as losses of the recipe's own see it: the last stage's queries are the RoIs."""
    box_of_query = pairs.to_queries(torch.arange(len(boxes.boxes), device=texts.device), -1)[-1].flatten()
    d = None if c is None else c[-1].flatten(0, 1)[pairs.paired_queries(-1)]
    return StepContext(
        look.features,
        batch.image_sizes,
        boxes.targets,
        texts,
        list(look.boxes[-1].detach()),
        box_of_query,
        look.deltas.flatten(0, 1),
        classified[-1].flatten(0, 1),
        d,
    )
