"""RT-DETR as one function of tensors alone (`detectors`)."""

import torch
from torch import Tensor

from hdovd.modeling.export.detectors import ExportableDetector, Found
from hdovd.modeling.queries.scores import query_scores
from hdovd.modeling.rtdetr.model import RTDETR


class ExportableRTDETR(ExportableDetector):
    """`RTDETR.predict` of one picture. After the network there is a top-k and nothing else."""

    backgrounds: Tensor
    object_text: Tensor

    def __init__(self, model: RTDETR) -> None:
        super().__init__(model)
        self.config, self.has_second = model.config, model.recipe.loss.uses_pseudo_boxes
        self.backbone, self.network, self.adapters, self.last = (
            model.backbone,
            model.network,
            model.adapters,
            model.stage(-1),
        )
        self.register_buffer("backgrounds", model.backgrounds(model.background).detach(), persistent=False)
        self.register_buffer("object_text", model.object_text, persistent=False)

    def rois(self, image: Tensor) -> Found:
        """The last stage's queries."""
        pixels, size, factor = self.prepare(image)
        whole = torch._shape_as_tensor(pixels)[1:].to(pixels)
        maps = list(self.backbone(pixels[None]).values())
        found = self.network(maps, size.to(pixels)[None], whole, self.object_text)
        content = found.contents[-1][0]
        c = self.last.describe(content)
        boxes = found.boxes[-1][0] / torch.cat([factor.flip(0), factor.flip(0)]).to(pixels)
        distilled = self.adapters.distilled(c) if self.has_second else None
        return Found(boxes, self.adapters.classified(c), distilled, self.last.object_logits(content).sigmoid())

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = self.config.decoder.logit_scale, self.recipe.inference.distillation_scale
        return query_scores(c, d, texts, self.backgrounds, *scales)
