"""What a detector is to the stages, and how one is built from a recipe: by its name in the registry, or module:Class of
the user's own.

N images, R boxes of an image, C classes, K base classes, D embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hdovd.config.detector import DETECTORS
from hdovd.config.plugins import resolve_class
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError
from hdovd.data.targets import Targets


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
class Students:
    """q (n, D) L2-normalised student embeddings (METHOD section 4), box (n,) int64 the boxes that they are of, numbered
    image by image, base before pseudo; targets: those of the batch with the pseudo boxes that were used.
    """

    q: Tensor
    box: Tensor
    targets: list[Targets]


class Detector(nn.Module):
    """What the stages use of a detector; built as MyDetector(recipe, dim, log), which has to set `recipe`, `dim` and
    `backbone`.

    Text embeddings are arguments: a detector holds no class list. `log` None: weights are loaded over it, so nothing is
    initialised that would have to be downloaded. With `norm = "batch"`, batch norms of `backbone` become SyncBatchNorm
    in several processes.
    """

    recipe: Recipe
    dim: int
    backbone: nn.Module
    knows_objects: bool = True  # False: training has to give it the text embedding of "object" first
    # module:Class of a module over (image, texts, is_novel) that torch can trace (`exportable`); None: no export but
    # safetensors
    exportable: ClassVar[str | None] = None
    training_parts: ClassVar[tuple[str, ...]] = ()  # beginnings of names in the state that no detection depends on
    has_idle_parameters: ClassVar[bool] = False  # whether some have no part in some steps

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

    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        """Boxes of every image with their scores for any classes; no gradient.

        Args:
            images: (3, h, w) uint8 RGB each. texts: (C, D) text embeddings of the classes asked for.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict")

    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        """The student embeddings of a batch, as `forward` makes them for the instance level; no loss, and no memory
        changes.
        """
        raise HdovdError(f"detector {self.recipe.detector.name} does not give the embeddings of its boxes (`students`)")


def build_detector(recipe: Recipe, dim: int, log: Callable[[str], None] | None) -> Detector:
    """The detector that a recipe names, for embeddings of `dim` numbers. Raises HdovdError if there is none, or it
    cannot be built.
    """
    name = recipe.detector.name
    kind = resolve_class(DETECTORS.get(name, name), "detector.name", Detector, "hdovd.modeling.base.Detector")
    return kind(recipe, dim, log)
