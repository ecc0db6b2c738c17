"""What a detector is to the stages (`Detector`), how a recipe builds one, and what its losses see (`StepContext`).

A detector is named by its key in the registry, or as module:Class of the user's own. A recipe adds losses as sections
[loss.extra.NAME] (docs/EXTENDING.md): `use` names a class of torch.nn.Module, built as MyLoss(dim=D, channels=C,
**options), options being all keys of the section but `use` and `weight`. Called with a `StepContext`, it returns a
scalar; the detector adds `weight` times it to its losses as NAME, and its state is in the checkpoint.

N images of this process, R RoIs or boxes of an image, P positive RoIs, B boxes (image by image, base before pseudo), C
classes or pyramid channels, K base classes, D embedding size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import DETECTORS
from hdovd.config.recipe import ExtraLossConfig, Recipe
from hdovd.core import HdovdError
from hdovd.core.registry import resolve_class
from hdovd.data.targets import Targets
from hdovd.modeling.batching import batch_images


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of one process, before any loss of it.

    features: pyramid maps (N, C, h, w) by level name; level "5" has stride 2^5, "pool" is the one pooled from the last.
    image_sizes: (height, width) pixels of each picture in the padded batch; boxes and RoIs are in the same pixels.
    targets: boxes and cached rows of each image, with the pseudo boxes that are used. texts: (K, D) base classes.
    rois: (R_i, 4) xyxy each. box_of_roi: (R,) int64, the box in 0..B-1 that a positive RoI belongs to, or -1.
    deltas: (R, 4) predicted offsets. c: (R, D) classification feature. d: (P, D) distillation feature of the P positive
    RoIs, those with a box, in their order; None if the recipe does without the instance level.
    """

    features: dict[str, Tensor]
    image_sizes: list[tuple[int, int]]
    targets: list[Targets]
    texts: Tensor
    rois: list[Tensor]
    box_of_roi: Tensor
    deltas: Tensor
    c: Tensor
    d: Tensor | None


@dataclass(frozen=True, slots=True)
class RoIPredictions:
    """What a detector says of one image's boxes, before thresholds and NMS.

    boxes (R, 4) xyxy pixels of the original image; class_probability (R, C+1) softmax s1, background last;
    distillation_score (R, C) s2 in 0..1, or None if the model has no second score.
    """

    boxes: Tensor
    class_probability: Tensor
    distillation_score: Tensor | None


@dataclass(frozen=True, slots=True)
class Regions:
    """What a detector finds in a batch, whatever the classes: R regions of all pictures, one picture's after another's.

    boxes (R, 4) xyxy pixels of the padded batch; c (R, D) features that are compared with the classes' texts, d (R, D)
    those that distillation taught, None if the model has none; counts: regions of each picture; objectness (R,) the
    probability that both scores are multiplied by, or None.
    """

    boxes: Tensor
    c: Tensor
    d: Tensor | None
    counts: list[int]
    objectness: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Students:
    """q (n, D) L2-normalised student embeddings (METHOD section 4), box (n,) int64 the boxes that they are of, numbered
    image by image, base before pseudo; targets: those of the batch with the pseudo boxes that were used.
    """

    q: Tensor
    box: Tensor
    targets: list[Targets]


class Detector(nn.Module):
    """What the stages use of a detector; built as MyDetector(recipe, dim, initialise), which has to set `recipe`,
    `dim` and `backbone`. It has a `forward`, and either `regions` and `scores` or a `predict` of its own.

    Text embeddings are arguments: a detector holds no class list. Without `initialise`, weights are loaded over it, so
    nothing is initialised that would have to be downloaded. With `norm = "batch"`, batch norms of `backbone`
    become SyncBatchNorm in several processes.
    """

    recipe: Recipe
    dim: int
    backbone: nn.Module
    knows_objects: bool = True  # False: training has to give it the text embedding of "object" first
    # module:Class of a module over (image, texts, is_novel) that torch can trace; None: no export but safetensors
    exportable: ClassVar[str | None] = None
    suppresses: ClassVar[bool] = True  # whether there is an NMS within: a trace then takes one picture at a time
    training_parts: ClassVar[tuple[str, ...]] = ()  # beginnings of names in the state that no detection depends on
    knows_backgrounds: ClassVar[bool] = False  # whether texts of backgrounds are of use to it
    undecayed: ClassVar[tuple[str, ...]] = ()  # patterns of parameters' names without weight decay: "*norm*", "*.bias"
    has_idle_parameters: ClassVar[bool] = False  # whether some have no part in some steps

    background_texts: Tensor  # (B, D), of those that know backgrounds

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.register_buffer("background_texts", torch.zeros(0), persistent=False)
        self.register_load_state_dict_pre_hook(_with_background_texts)

    def set_background_texts(self, rows: Tensor) -> None:
        """Before training: (B, D) text embeddings of what is no object, whose probabilities are added to that of the
        learned background. They are kept with the weights.
        """
        self.register_buffer("background_texts", rows.detach().clone())

    def backgrounds(self, learned: Tensor) -> Tensor:
        """(B + 1, D): the texts of backgrounds, then the learned embedding (1, D)."""
        return torch.cat([self.background_texts, learned]) if len(self.background_texts) else learned

    def set_object_text(self, row: Tensor) -> None:
        """Before training: (D,) the text embedding of the word "object", for a detector that knows objects by it."""

    def begin_epoch(self, epoch: int) -> None:
        """Before the steps of an epoch, counted from 1; also when training goes on in the middle of one."""

    def forward(
        self, images: list[Tensor], targets: list[Targets], texts: Tensor, keys: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses of one batch, by name; their sum is minimised.

        Args:
            images: (3, h, w) uint8 RGB each. targets: one an image, in its pixels.
            texts: (K, D) text embeddings of the base classes.
            keys: a whole number below 2**63 an image, which seeds all random choices about it; None: torch's global
            generator.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    @torch.inference_mode()
    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        """Boxes of every image with their scores for any classes; no gradient.

        Args:
            images: (3, h, w) uint8 RGB each. texts: (C, D) text embeddings of the classes asked for.
        """
        batch, factors = batch_images(images, self.recipe.input)
        found = self.regions(batch)
        s1, s2 = self.region_scores(found, texts)
        seconds = [None] * len(images) if s2 is None else s2.split(found.counts)
        per_image = zip(found.boxes.split(found.counts), factors, s1.split(found.counts), seconds, strict=True)
        return [
            RoIPredictions(boxes / boxes.new_tensor([*factor, *factor]), one, two)
            for boxes, factor, one, two in per_image
        ]

    def regions(self, batch: ImageList) -> Regions:
        """What is found in a padded batch. To be traced, of one picture, whose size is then a tensor (1, 2): nothing
        that a picture decides may become a number of Python's.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict, or regions and scores")

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of regions' features for the classes with texts (C, D): s1 (R, C + 1), background last, and s2 (R, C), as in
        METHOD section 7.
        """
        raise NotImplementedError(f"{type(self).__name__}.scores")

    def region_scores(self, found: Regions, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both scores, times the probability of an object where there is one; what the classes lose is the
        background's.
        """
        first, second = self.scores(found.c, found.d, texts)
        if found.objectness is None:
            return first, second
        share = found.objectness[:, None]
        classes = first[:, :-1] * share
        return torch.cat(
            [classes, 1 - classes.sum(dim=1, keepdim=True)], dim=1
        ), None if second is None else second * share

    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        """The student embeddings of a batch, as `forward` makes them for the instance level; no loss, and no memory
        changes.
        """
        raise HdovdError(f"detector {self.recipe.detector.name} does not give the embeddings of its boxes (`students`)")


def _with_background_texts(module: Detector, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Weights that were trained with texts of backgrounds bring them; those of before there were any have none."""
    if (rows := state.get(prefix + "background_texts")) is not None:
        module.set_background_texts(rows.to(module.background_texts.device))


def build_detector(recipe: Recipe, dim: int, initialise: bool = True) -> Detector:
    """The detector that a recipe names, for embeddings of `dim` numbers. Raises HdovdError if there is none, or it
    cannot be built.
    """
    kind = DETECTORS.find_class(recipe.detector.name, Detector, "hdovd.modeling.base.Detector")
    return kind(recipe, dim, initialise)


OWN_NAMES = (
    "rpn_objectness",
    "rpn_box",
    "classification",
    "box",
    "instance_alignment",
    "instance_relation",
    "image_alignment",
    "rpn_cls",
    "rpn_aux_cls",
    "rpn_aux_box",
    "objectness",
    "giou",
    "text_alignment",
    "text_relation",  # AdaMixer's
    "selection_objectness",
    "selection_box",
    "selection_giou",
    "denoising_classification",
    "denoising_objectness",
    "denoising_box",
    "denoising_giou",  # RT-DETR's
    "step",
    "epoch",
    "lr",
    "images_per_s",
    "data_wait",
    "memory_gb",
)  # losses, and what the log has beside them


class ExtraLosses(nn.Module):
    """The losses of a recipe's loss.extra sections, by name. Raises HdovdError naming the section that does not fit the
    contract.
    """

    def __init__(self, configs: dict[str, ExtraLossConfig], dim: int, channels: int) -> None:
        super().__init__()
        self.weights = {name: config.weight for name, config in configs.items()}
        self.parts = nn.ModuleDict({name: _build(name, config, dim, channels) for name, config in configs.items()})

    def forward(self, view: StepContext) -> dict[str, Tensor]:
        losses = {}
        for name, part in self.parts.items():
            loss = part(view)
            if not isinstance(loss, Tensor) or loss.shape != ():
                found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise HdovdError(
                    f"loss.extra.{name}: {type(part).__name__}.forward: expected a scalar tensor (shape ()), found "
                    f"{found}"
                )
            losses[name] = self.weights[name] * loss.float()  # bfloat16 under autocast
        return losses


def _build(name: str, config: ExtraLossConfig, dim: int, channels: int) -> nn.Module:
    section = f"loss.extra.{name}"
    if name in OWN_NAMES or name.startswith("val_"):
        raise HdovdError(
            f"{section}: the log has a column of that name: choose another than {', '.join(OWN_NAMES)} and val_..."
        )
    kind = resolve_class(config.use, f"{section}.use", nn.Module, "torch.nn.Module")
    try:
        return kind(dim=dim, channels=channels, **config.options)
    except TypeError as error:
        raise HdovdError(
            f"{section}: {config.use} is built with dim, channels and the section's other keys "
            f"({', '.join(config.options) or 'none'}): {error}"
        ) from error
