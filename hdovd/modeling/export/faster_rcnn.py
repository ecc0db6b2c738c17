"""Faster R-CNN as one function of tensors alone (`exportable`). Called by the stage `export_model`.

R RoIs, C classes, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from hdovd.modeling.export.base import ExportableDetector, at_most, best_places, clip
from hdovd.modeling.faster_rcnn.model import CODER, FasterRCNN
from hdovd.modeling.losses import classwise
from hdovd.modeling.rpn import ExactAnchors

_MANY_BOXES = 1000  # torchvision's batched_nms goes class by class where there are more; else it shifts the classes apart
_SMALLEST = 1e-3  # pixels; torchvision's RPN drops proposals with a shorter side


class ExportableFasterRCNN(ExportableDetector):
    """`FasterRCNN.predict` of one picture."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__(model)
        self.backbone, self.rpn, self.pool, self.head, self.background = model.backbone, model.rpn, model.pool, model.head, model.background
        for level, anchors in enumerate(model.rpn.anchor_generator.cell_anchors):
            self.register_buffer(f"anchors{level}", anchors.float().clone(), persistent=False)

    def rois(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """c, and d if the model has it."""
        pixels, size, factor = self.prepare(image)
        features = self.backbone(pixels[None])
        limit = torch.cat([size.flip(0), size.flip(0)]).to(pixels)
        proposals = self._proposals(features, pixels.shape, limit)
        deltas, c, r = self.head(self._pooled(features, proposals))
        boxes = clip(CODER.decode_single(deltas, proposals), limit)
        return boxes / torch.cat([factor.flip(0), factor.flip(0)]).to(boxes), c, self.head.distill(r)

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        prompts = torch.cat([texts, self.background[None]])
        first = classwise.cosine_logits(c, prompts, self.recipe.faster_rcnn.head.logit_scale).softmax(dim=1)
        if d is None:
            return first, None
        return first, classwise.cosine_logits(d, texts, self.recipe.inference.distillation_scale).sigmoid()

    def _pooled(self, features: dict[str, Tensor], rois: Tensor) -> Tensor:
        """`PyramidRoIAlign.forward` of one picture: how many RoIs each level has is not known when it is traced."""
        level_of, indexed = self.pool.level_of(rois), torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1)
        rows = [(level_of == level).nonzero().flatten() for level in self.pool.levels]
        crops = torch.cat([self.pool.crop(features, level, indexed[r]) for level, r in zip(self.pool.levels, rows, strict=True)])
        return crops.index_select(0, torch.cat(rows).argsort())

    def _proposals(self, features: dict[str, Tensor], shape: torch.Size, limit: Tensor) -> Tensor:
        """The RPN's `filter_proposals`: (R, 4) pixels of the batch, best first."""
        rpn = self.rpn
        boxes, scores = [], []
        for level, (logits, deltas) in enumerate(zip(*rpn.head(list(features.values())), strict=True)):
            anchors = self._anchors(level, logits, shape)
            logits = logits[0].permute(1, 2, 0).flatten()
            best = logits.topk(at_most(logits, rpn.pre_nms_top_n())).indices
            deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            level_boxes = clip(rpn.box_coder.decode_single(deltas[best], anchors[best]), limit)
            keep = ((level_boxes[:, 2:] - level_boxes[:, :2]).amin(dim=1) >= _SMALLEST).nonzero().flatten()
            boxes.append(level_boxes[keep])
            scores.append(logits[best][keep].sigmoid())
        together = torch.cat([torch.cat(boxes), torch.zeros_like(limit[None])])  # one more, or there may be no largest
        few = torch._shape_as_tensor(together)[0] - 1 <= _MANY_BOXES
        shift = few.to(limit) * (together.amax() + 1)
        kept = [nms(b + level * shift, s, rpn.nms_thresh) for level, (b, s) in enumerate(zip(boxes, scores, strict=True))]
        boxes, scores = ([rows[k] for rows, k in zip(parts, kept, strict=True)] for parts in (boxes, scores))
        return torch.cat(boxes)[best_places(torch.cat(scores), rpn.post_nms_top_n())]

    def _anchors(self, level: int, logits: Tensor, shape: torch.Size) -> Tensor:
        """torchvision's grid of anchors over a map of logits (1, A, h, w): (h * w * A, 4)."""
        cells = self.get_buffer(f"anchors{level}")
        rows, columns = (torch.ones_like(line).cumsum(0) - 1 for line in (logits[0, 0, :, 0], logits[0, 0, 0, :]))
        if isinstance(self.rpn.anchor_generator, ExactAnchors):
            stride = 2 ** (self.pool.levels[0] + level)
            rows, columns = rows * stride, columns * stride
        else:
            rows, columns = rows * (shape[1] // logits.shape[2]), columns * (shape[2] // logits.shape[3])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return (torch.stack([x, y, x, y], dim=2).unsqueeze(2) + cells).reshape(-1, 4)
