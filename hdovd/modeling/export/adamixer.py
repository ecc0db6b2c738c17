"""AdaMixer as one function of tensors alone (`hdovd.modeling.export.base`). Called by the stage `export_model`.

R queries, C classes, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from hdovd.modeling.adamixer.boxes import to_corners, to_xyzr
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.adamixer.proposals import DensePredictions, by_rank
from hdovd.modeling.adamixer.sampling import SamplingTable
from hdovd.modeling.export.base import ExportableDetector, best_places
from hdovd.modeling.losses.classwise import cosine_logits


class ExportableAdaMixer(ExportableDetector):
    """`AdaMixer.predict` of one picture."""

    object_text: Tensor

    def __init__(self, model: AdaMixer) -> None:
        super().__init__(model)
        self.config, self.strides, self.has_second = model.config, model.strides, model.recipe.loss.uses_pseudo_boxes
        self.backbone, self.norms, self.proposals, self.stages = model.backbone, model.norms, model.proposals, model.stages
        self.last, self.adapters, self.background = model.stage(-1), model.adapters, model.background
        self.register_buffer("object_text", model.object_text, persistent=False)

    def rois(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last stage's queries: the class feature in text space, as the classifier and as the distillation move it."""
        pixels, _, factor = self.prepare(image)
        maps = [norm(m) for norm, m in zip(self.norms, self.backbone(pixels[None]).values(), strict=True)]
        trunk = self.proposals.trunk(maps[1:])
        start = self._start(self.proposals.main(trunk, self.strides[1:], self.object_text), trunk)[None]
        table = SamplingTable(maps[:-1], self.strides[:-1])
        content, xyzr = self.proposals.content(table, start), to_xyzr(start)
        for stage in self.stages:
            content, xyzr, _ = stage(table, content, xyzr)
        c = self.last.describe(content[0])
        boxes = to_corners(xyzr[0]) / torch.cat([factor.flip(0), factor.flip(0)]).to(xyzr)
        return boxes, self.adapters.classified(c), self.adapters.distilled(c) if self.has_second else None

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        first = cosine_logits(c, torch.cat([texts, self.background]), self.config.decoder.logit_scale).softmax(dim=1)
        if d is None:
            return first, None
        return first, cosine_logits(d, texts, self.recipe.inference.distillation_scale).softmax(dim=1)

    def _start(self, dense: DensePredictions, maps: list[Tensor]) -> Tensor:
        """`QueryProposals.candidates` and `choose` of one picture: (R, 4) xyxy."""
        probability, boxes = dense.probability[0], dense.boxes[0]
        counts = torch.stack([torch._shape_as_tensor(m)[2:].prod() for m in maps])
        ends = counts.cumsum(0)
        chosen = [best_places(probability[end - count : end], self.config.proposals.pre_nms) + (end - count)
                  for count, end in zip(counts, ends, strict=True)]
        best = torch.cat(chosen)
        probability, boxes = probability[best], boxes[best]
        exact = torch.float32 if torch.onnx.is_in_onnx_export() else torch.float64  # ONNX has no other NMS
        kept = nms(boxes.to(exact), probability.to(exact), self.config.proposals.nms)
        distinct = torch.zeros_like(probability).index_fill(0, kept, 1.0) * probability > 0
        return boxes[best_places(by_rank(probability, distinct), self.config.decoder.queries)]
