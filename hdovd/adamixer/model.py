"""AdaMixer as HD-OVD trains it. Built by the stages train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hdovd.config import Recipe
from hdovd.detectors import Detector, RoIPredictions, Students
from hdovd.targets import Targets


class AdaMixer(Detector):
    """The query-based detector. Text embeddings are arguments; that of the word "object" is kept (`set_object_text`)."""

    def __init__(self, recipe: Recipe, dim: int, log: Callable[[str], None] | None) -> None:
        super().__init__()
        self.recipe, self.dim = recipe, dim
        self.object_text: Tensor
        self.register_buffer("object_text", torch.zeros(dim))

    def set_object_text(self, row: Tensor) -> None:
        """(D,) text embedding of "object", which the proposals' objectness is measured against; it is in the checkpoint."""
        self.object_text.copy_(row)

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, 1 the first: pseudo boxes and distillation take part from `pseudo_boxes.from_epoch` on."""

    def forward(self, images: list[Tensor], targets: list[Targets], texts: Tensor,
                keys: Sequence[int] | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def students(self, images: list[Tensor], targets: list[Targets], keys: Sequence[int] | None = None) -> Students:
        raise NotImplementedError

    def predict(self, images: list[Tensor], texts: Tensor) -> list[RoIPredictions]:
        raise NotImplementedError
