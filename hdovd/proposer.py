"""The class-agnostic proposal network of `hdovd propose`: a backbone and an RPN that scores localisation.

It is trained on base boxes alone and never sees a class label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hdovd.backbone import build_backbone
from hdovd.batching import batch_images, draw_short_sides
from hdovd.config import Recipe
from hdovd.rpn import LocalisationRPN, build_rpn


class ProposalNetwork(nn.Module):
    def __init__(self, recipe: Recipe, log: Callable[[str], None]) -> None:
        super().__init__()
        self.recipe = recipe
        backbone = recipe.detector.backbone
        self.backbone = build_backbone(backbone, log)
        self.rpn = build_rpn(recipe.detector.rpn, backbone.fpn_channels, len(backbone.levels) + 1, kind=LocalisationRPN,
                             positive_iou=0.5, negative_iou=0.1)

    def forward(self, images: list[Tensor], boxes: list[Tensor]) -> dict[str, Tensor]:
        """Losses of one batch: images (3, h, w) uint8 each, boxes (n, 4) xyxy pixels each."""
        short_sides = draw_short_sides([None] * len(images), self.recipe.input)
        batch, factors = batch_images(images, self.recipe.input, short_sides)
        scaled = [{"boxes": b * b.new_tensor([*f, *f])} for b, f in zip(boxes, factors, strict=True)]
        _, losses = self.rpn(batch, self.backbone(batch.tensors), scaled)
        return {"score": losses["loss_objectness"], "box": losses["loss_rpn_box_reg"]}

    @torch.inference_mode()
    def propose(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) xyxy pixels of the original image and scores (n,), best first."""
        batch, factors = batch_images(images, self.recipe.input)
        found = self.rpn.scored_proposals(batch, self.backbone(batch.tensors))
        return [(boxes / boxes.new_tensor([*f, *f]), scores) for (boxes, scores), f in zip(found, factors, strict=True)]
