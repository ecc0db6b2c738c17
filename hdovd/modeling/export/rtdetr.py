"""RT-DETR as one function of tensors alone (`detectors`)."""

import torch
from torch import Tensor

from hdovd.modeling.boxes import best_places
from hdovd.modeling.export.detectors import ExportableQueries, Found
from hdovd.modeling.rtdetr.model import RTDETR


class ExportableRTDETR(ExportableQueries):
    """`RTDETR.predict` of one picture, or of N of one size. After the network there is a top-k and nothing else."""

    def __init__(self, model: RTDETR) -> None:
        super().__init__(model)
        self.batches = model.recipe.inference.nms >= 1
        self.network = model.network

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect. Of pictures (N, 3, h, w): boxes (N, n, 4), scores and labels (N, n), as many of each; a score that is
        not over the threshold is 0.
        """
        if image.dim() == 3:
            return super().forward(image, texts, is_novel)
        boxes, scores = self.all_scores(image, texts, is_novel)
        images, inference = image.shape[0], self.recipe.inference
        flat, classes = scores.reshape(images, -1), torch._shape_as_tensor(scores)[1].clamp(min=1)
        best = best_places(flat, inference.detections_per_image)
        score = flat.gather(1, best)
        query = (best // classes)[..., None].expand(-1, -1, 4)
        boxes = boxes.view(images, -1, 4).gather(1, query)
        return boxes, torch.where(score > inference.score_threshold, score, 0), best % classes

    def rois(self, image: Tensor) -> Found:
        """The last stage's queries, of one picture or of all."""
        pixels, size, factor = self.prepare(image if image.dim() == 4 else image[None])
        whole = torch._shape_as_tensor(pixels)[2:].to(pixels)
        maps = list(self.backbone(pixels).values())
        found = self.network(maps, size.to(pixels).expand(pixels.shape[0], -1), whole, self.object_text)
        content = found.contents[-1].flatten(0, 1)
        boxes = found.boxes[-1].flatten(0, 1) / torch.cat([factor.flip(0), factor.flip(0)]).to(pixels)
        return self.found(content, boxes, self.last.object_logits(content).sigmoid())
