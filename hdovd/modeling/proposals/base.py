"""The networks of `hdovd propose`: what they have in common, and the plain region proposal network.

They are trained on base boxes alone and never see a class label. The other one is `oln`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from hdovd.config.recipe import Recipe
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.modeling.batching import batch_images, draw_short_sides, keys_of
from hdovd.modeling.rpn import build_rpn


class ProposalNetwork(nn.Module, ABC):
    """A backbone, and what finds boxes on its feature maps. Without `initialise` it is left as it is, because
    weights are loaded over it.
    """

    def __init__(self, recipe: Recipe, initialise: bool = True) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build_backbone(recipe.detector.backbone, initialise)

    @abstractmethod
    def losses(self, batch: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Weighted losses by name. A target holds `boxes` (n, 4) xyxy in batch pixels, and the `key` of its image or
        None.
        """

    @abstractmethod
    def scored(self, batch: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) xyxy in batch pixels, inside the picture, and scores (n,) in 0..1 of each image, in any
        order."""

    def forward(
        self, images: list[Tensor], boxes: list[Tensor], keys: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The losses of one batch, by name; with several processes those of the global batch in the mean
        (`distributed`).

        Args:
            images: (3, h, w) uint8 each. boxes: (n, 4) xyxy pixels each, n may be 0.
            keys: one an image, which seeds all random choices about it; None draws from torch's global generator.
        """
        image_keys = keys_of(keys, len(images))
        batch, factors = batch_images(images, self.recipe.input, draw_short_sides(image_keys, self.recipe.input))
        targets = [
            {"boxes": b * b.new_tensor([*f, *f]), "key": key}
            for b, f, key in zip(boxes, factors, image_keys, strict=True)
        ]
        return self.losses(batch, self.backbone(batch.tensors), targets)

    @torch.inference_mode()
    def propose(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) xyxy pixels of the original image and scores (n,), best first, after NMS at `proposals.nms`."""
        batch, factors = batch_images(images, self.recipe.input)
        found = []
        for (boxes, scores), factor in zip(self.scored(batch, self.backbone(batch.tensors)), factors, strict=True):
            keep = nms(boxes, scores, self.recipe.proposals.nms)
            found.append((boxes[keep] / boxes.new_tensor([*factor, *factor]), scores[keep]))
        return found


class ObjectnessNetwork(ProposalNetwork):
    """A class-agnostic RPN that tells objects from background: an unlabelled object is background to it. The baseline
    of OLN.
    """

    def __init__(self, recipe: Recipe, initialise: bool = True) -> None:
        super().__init__(recipe, initialise)
        backbone = recipe.detector.backbone
        self.rpn = build_rpn(recipe.faster_rcnn.rpn, backbone.fpn_channels, len(backbone.levels) + 1)

    def losses(self, batch: ImageList, features: dict[str, Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        _, losses = self.rpn(batch, features, targets)
        return {"objectness": losses["loss_objectness"], "box": losses["loss_rpn_box_reg"]}

    def scored(self, batch: ImageList, features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return self.rpn.scored_proposals(batch, features)
