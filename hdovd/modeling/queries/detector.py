"""A detector made of queries, as HD-OVD distils into it (arXiv 2503.10152; METHOD section 11): all but its network.

What finds (`find`) and what only this network is trained by (`own_losses`) is the subclass's. N pictures, Q queries of
each, S stages, X prompts, C channels, D embedding size, K classes, G boxes of the batch (`pairs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import FORMS, QueryDetectorConfig
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, log
from hdovd.data.targets import Targets, scale_all
from hdovd.modeling.base import Detector, ExtraLosses, Regions, StepContext, Students
from hdovd.modeling.batching import batch_images, draw_short_sides, keys_of
from hdovd.modeling.distributed import divisor
from hdovd.modeling.levels.classwise import prompts_and_labels
from hdovd.modeling.levels.imagewise import ImageLevel
from hdovd.modeling.losses.classwise import (
    class_probability,
    classification_loss,
    cosine_logits,
    of_judged,
    with_one_background,
)
from hdovd.modeling.queries.losses import InstanceLevels, TextLevel, box_losses, objectness_loss, query_weights
from hdovd.modeling.queries.pairs import (
    Candidates,
    Pairs,
    StepBoxes,
    boxes_of_step,
    pair_candidates,
    pair_stages,
    pairing_costs,
    to_device,
    to_host,
)

LEAST_PROBABILITY = 1e-5  # of a candidate, and 1 less it the most, in the cost of pairing it; released code
RARE = -4.595  # logit of the share of queries that hold an object at the start: 1 %


def xavier(*modules: nn.Module) -> None:
    """Xavier for weights, zero for biases; norms as they are."""
    for part in nn.ModuleList(modules).modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class QueryStage(nn.Module):
    """One stage of the network; what its queries hold is read apart."""

    class_feature: nn.Sequential
    objectness: nn.Sequential

    def describe(self, content: Tensor) -> Tensor:
        """The class feature c (..., D) float32 of contents (..., C): in the space of CLIP's image embeddings."""
        return cast(Tensor, self.class_feature(content).float())

    def object_logits(self, content: Tensor) -> Tensor:
        """Logits (...) float32 of there being an object."""
        return cast(Tensor, self.objectness(content)[..., 0].float())


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
        return cast(Tensor, c + self.visual_to_text(c).float())

    def distilled(self, c: Tensor) -> Tensor:
        """(..., D) -> (..., D) float32."""
        last = self.visual_to_text[-1].get_parameter("weight").detach()
        with torch.autocast(c.device.type, enabled=False):
            return cast(Tensor, c + c @ self.transfer(last).T)


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What the network finds in a batch.

    features: pyramid maps by level name. candidates: what queries were chosen from. contents: (N, Q, C) after each
    stage. boxes: (N, Q, 4) xyxy pixels of the padded batch, after each stage. deltas: (N, Q, 4) of the last stage.
    """

    features: dict[str, Tensor]
    candidates: Candidates
    contents: list[Tensor]
    boxes: list[Tensor]
    deltas: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """A training step before the network has seen it.

    keys: one an image, or None. prompts: (X, D), the last rows those of backgrounds. labels: (G,) int64, the prompt
    that the query of each box should be found by. background: the first prompt of a background, which stands for all.
    classes: K, the first prompts.
    """

    boxes: StepBoxes
    keys: Sequence[int | None]
    prompts: Tensor
    labels: Tensor
    background: int
    classes: int


class QueryDetector(Detector):
    """Text embeddings are arguments: it holds no class list. It knows objects by the text embedding of the word
    "object", which it keeps (`set_object_text`). Without one, the mean of the base classes' embeddings is taken in the
    first training step, and logged.
    """

    knows_backgrounds = True
    has_idle_parameters = True  # before `pseudo_boxes.from_epoch`: the adapter of the text level, and the image level

    config: QueryDetectorConfig
    stages: nn.ModuleList
    object_text: Tensor

    def __init__(self, recipe: Recipe, dim: int, name: str) -> None:
        """`name`: of the form that the [detector] section has to have."""
        super().__init__()
        if not isinstance(recipe.detector, FORMS[name]):
            raise HdovdError(
                f"detector.name = {recipe.detector.name!r}: this detector needs a recipe with detector.name = {name!r}"
            )
        self.recipe, self.dim, self.config = recipe, dim, cast(QueryDetectorConfig, recipe.detector)

    def finish(self) -> None:
        """Add the parts that all such detectors have, after a detector's own."""
        recipe, dim, config = self.recipe, self.dim, self.config
        self.adapters = TextAdapters(dim, config.decoder.adapter_channels)
        self.background = nn.Parameter(torch.randn(1, dim))
        self.register_buffer("object_text", torch.zeros(dim))
        self.knows_objects = False
        self.register_load_state_dict_post_hook(QueryDetector._see_object_text)
        loss, stages, backbone = recipe.loss, config.decoder.stages, config.backbone
        self.instance_level = InstanceLevels(loss.instance, stages, dim) if loss.instance.enabled else None
        self.text_level = TextLevel(config.text, stages, dim) if loss.class_.enabled else None
        self.image_level = (
            ImageLevel(loss.image, backbone.levels, backbone.fpn_channels, dim) if loss.image.enabled else None
        )
        self.extra = ExtraLosses(loss.extra, dim, backbone.fpn_channels)
        self.distils = True

    @staticmethod
    def _see_object_text(module: "QueryDetector", _: object) -> None:
        module.knows_objects = bool(module.object_text.any())

    def set_object_text(self, row: Tensor) -> None:
        """(D,) the text embedding of "object", which candidates are measured against; it is in the checkpoint."""
        self.object_text.copy_(row.detach())
        self.knows_objects = bool(row.any())

    def require_object_text(self) -> None:
        """Raises HdovdError if the text of "object" is not known."""
        if not self.knows_objects:
            raise HdovdError(
                'this detector was not trained and was given no text embedding of "object" (set_object_text)'
            )

    def find(self, batch: ImageList, step: Step | None = None) -> ForwardOutput:
        """Run a padded batch through the network; with a step, also those parts that are there for training alone.

        Raises HdovdError if the text of "object" is not known.
        """
        raise NotImplementedError(f"{type(self).__name__}.find")

    def own_losses(self, look: ForwardOutput, step: Step, paired: Tensor) -> dict[str, Tensor]:
        """The weighted losses of the network's own parts. `paired`: (N, H) int64, the candidate of each object, or
        -1.
        """
        raise NotImplementedError(f"{type(self).__name__}.own_losses")

    def objectness_of(self, logits: Tensor, pairs: Pairs, boxes: StepBoxes, count: Tensor) -> Tensor:
        """The loss () of the stages' objectness (S, N, Q): a focal loss, by which every query with a box is an
        object."""
        return objectness_loss(logits, pairs.to_queries(torch.ones_like(boxes.weights), 0.0), count)

    def certainty(self, look: ForwardOutput) -> Tensor | None:
        """What both scores are multiplied by in prediction, (N Q,), or None."""
        return None

    def stage(self, number: int) -> QueryStage:
        return cast(QueryStage, self.stages[number])

    def read(self, contents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class features (S, N, Q, D) and logits of objectness (S, N, Q) of the contents (N, Q, C) after each stage."""
        c = torch.stack([self.stage(s).describe(content) for s, content in enumerate(contents)])
        return c, torch.stack([self.stage(s).object_logits(content) for s, content in enumerate(contents)])

    def regions(self, batch: ImageList) -> Regions:
        """The last stage's queries of every image. Their boxes are not clipped to it (released code)."""
        look = self.find(batch)
        c = self.stage(-1).describe(look.contents[-1]).flatten(0, 1)
        d = self.adapters.distilled(c) if self.recipe.loss.uses_pseudo_boxes else None  # else no level teaches it
        images, queries = look.boxes[-1].shape[:2]
        boxes = look.boxes[-1].flatten(0, 1)
        return Regions(boxes, self.adapters.classified(c), d, [queries] * images, self.certainty(look))

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both are a softmax over the classes (released code)."""
        texts, scale = texts.to(self.background), self.recipe.inference.distillation_scale
        first = class_probability(c, texts, self.backgrounds(self.background), self.config.decoder.logit_scale)
        return first, None if d is None else cosine_logits(d, texts, scale).softmax(dim=1)

    def begin_epoch(self, epoch: int) -> None:
        """The stages see pseudo boxes, and the levels distil, from the recipe's epoch on. Candidates see pseudo boxes
        in all epochs (released code).
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
            keys: a whole number below 2**63 an image, which decides all that is drawn about it. None: torch's global
            generator.

        Raises HdovdError for keys that do not fit.
        """
        if not self.knows_objects:
            self.set_object_text(F.normalize(F.normalize(texts.float(), dim=1).mean(dim=0), dim=0))
            log(
                f'{self.config.name}: no text embedding of "object" was given; the mean of the base classes\' texts '
                "stands in for it"
            )
        batch, boxes = self._batch(images, targets, keys)
        step = self._step(boxes, keys_of(keys, len(images)), texts)
        look = self.find(batch, step)
        c, logits = self.read(look.contents)
        pairs, paired = self._pair(look, logits, boxes)
        classified = self.adapters.classified(c)
        view = StepContext(  # as losses of the recipe's own see it: the last stage's queries are the RoIs
            look.features,
            batch.image_sizes,
            boxes.targets,
            texts,
            list(look.boxes[-1].detach()),
            pairs.to_queries(torch.arange(len(boxes.boxes), device=texts.device), -1)[-1].flatten(),
            look.deltas.flatten(0, 1),
            classified[-1].flatten(0, 1),
            None if self.instance_level is None else c[-1].flatten(0, 1)[pairs.paired_queries(-1)],
        )
        return {
            **self.own_losses(look, step, paired),
            **self._stage_losses(look, logits, classified, pairs, step),
            **self._distillation(view, c, pairs, boxes),
            **self.extra(view),
        }

    @torch.inference_mode()
    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        """The last stage's student embeddings, as `forward` makes them for the instance level; no loss, and no memory
        changes.

        Raises ValueError if the recipe does without the instance level.
        """
        if self.instance_level is None:
            raise ValueError("a detector without the instance level has no student embeddings")
        batch, boxes = self._batch(images, targets, keys)
        look = self.find(batch)
        c, logits = self.read(look.contents)
        pairs, _ = self._pair(look, logits, boxes)
        q, box = pairs.students(c)[-1]
        order = box.argsort()
        return Students(q[order], box[order], boxes.targets)

    def _batch(
        self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None
    ) -> tuple[ImageList, StepBoxes]:
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        return batch, boxes_of_step(
            scale_all(targets, factors),
            batch.image_sizes,
            self.recipe.pseudo_boxes,
            self.recipe.loss.class_,
            with_pseudo=self.distils,
        )

    def _step(self, boxes: StepBoxes, keys: Sequence[int | None], texts: Tensor) -> Step:
        backgrounds = self.backgrounds(self.background)
        with_pseudo = self.recipe.loss.class_.enabled
        prompts, labels = prompts_and_labels(boxes.targets, texts, backgrounds, with_pseudo=with_pseudo)
        return Step(boxes, keys, prompts, labels, len(prompts) - len(backgrounds), len(texts))

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
        candidates, queries = to_device([paired, query], logits.device)
        return Pairs.of(query, queries, on_host[3], iou, boxes), candidates

    def _stage_losses(
        self, look: ForwardOutput, logits: Tensor, classified: Tensor, pairs: Pairs, step: Step
    ) -> dict[str, Tensor]:
        weights, boxes = self.config.loss, step.boxes
        count = divisor(boxes.is_base.sum())
        wanted = pairs.to_queries(step.labels, step.background)
        far, apart = box_losses(torch.stack(look.boxes), pairs, boxes, count)
        return {
            "classification": self.classification(
                classified, wanted, query_weights(pairs, boxes, weights), step, count
            ),
            "objectness": weights.objectness * self.objectness_of(logits, pairs, boxes, count),
            "box": weights.box * far,
            "giou": weights.giou * apart,
        }

    def classification(self, features: Tensor, wanted: Tensor, weights: Tensor, step: Step, count: Tensor) -> Tensor:
        """The weighted classification loss () of features (S, N, Q, D) in text space, with the prompts (S, N, Q) that
        they should be found by.
        """
        backgrounds = len(step.prompts) - step.background
        scores = cosine_logits(features.flatten(0, 2), step.prompts, self.config.decoder.logit_scale)
        scores = with_one_background(scores, backgrounds)
        if self.recipe.loss.class_.federated:
            image = torch.arange(wanted.shape[1], device=wanted.device).view(1, -1, 1).expand_as(wanted).flatten()
            is_background = wanted.flatten() == step.background
            scores = of_judged(scores, [t.judged for t in step.boxes.targets], image, is_background)
        return self.config.loss.classification * classification_loss(scores, wanted.flatten(), weights.flatten(), count)

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
