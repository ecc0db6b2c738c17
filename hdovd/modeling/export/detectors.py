"""The detector as one function of tensors alone, from a picture to detections, that torch can trace.

It is `Detector.predict` and `boxes.detect` by the model's own parts (`Detector.regions`), so that a trace keeps what
depends on the data: sizes are tensors, nothing is a Python number that a picture decides. `traceable` is the way in.
R regions, C classes, D embedding size.
"""

import copy
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.core.registry import resolve
from hdovd.modeling.base import Detector, Regions
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.boxes import NO_SCORE, OnnxNms, best_places, combine_scores, kept_places


class ExportableDetector(nn.Module):
    """One picture, any classes, detections: what detection needs of a trained model, which is put in eval mode."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.recipe = model.recipe
        self.batches = not model.suppresses and model.recipe.inference.nms >= 1  # whether it takes several pictures too
        self.model = copy.copy(model.eval())
        parts = model._modules.items()
        self.model._modules = {name: part for name, part in parts if not f"{name}.".startswith(model.training_parts)}
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self.recipe.input, name)).view(3, 1, 1), persistent=False)
        self.eval()

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: (3, h, w) uint8 RGB, of any size; or (N, 3, h, w), if it `batches`.
            texts: (C, D) float32 text embeddings of the classes asked for, of any length.
            is_novel: (C,) bool: classes that were not annotated in training (METHOD section 7). Without effect on a
                model that has one score alone.

        Returns:
            Best first: boxes (n, 4) xyxy pixels of `image`, scores (n,), labels (n,) int64, rows of `texts`. Of several
            pictures (N, n, 4) and (N, n), as many of each; a score that is not over the threshold is 0.
        """
        found, config = self.rois(image), self.recipe.inference
        scores, second = self.model.region_scores(found, texts)
        if second is not None:
            scores = combine_scores(scores, second, is_novel, config.alpha, config.beta)
        scores = scores[:, :-1]
        if image.dim() == 3 and config.nms < 1 and torch.onnx.is_in_onnx_export():  # of all scores: in little memory
            over = scores.where(scores > config.score_threshold, NO_SCORE).T[None]
            kept = OnnxNms.apply(found.boxes[None], over, config.nms)
            classes, flat = torch._shape_as_tensor(scores)[1], scores.flatten()
            place = (kept[:, 2] * classes + kept[:, 1]).sort().values
            best = place[best_places(flat[place], config.detections_per_image)]
            return found.boxes[best // classes], flat[best], best % classes
        if image.dim() == 3:
            roi, label = (scores > config.score_threshold).nonzero().unbind(1)
            boxes, score = found.boxes[roi], scores[roi, label]
            best = kept_places(boxes, score, label, config)
            return boxes[best], score[best], label[best]
        flat, classes = scores.reshape(image.shape[0], -1), torch._shape_as_tensor(scores)[1].clamp(min=1)
        best = best_places(flat, config.detections_per_image)
        score, query = flat.gather(1, best), (best // classes)[..., None].expand(-1, -1, 4)
        boxes = found.boxes.view(image.shape[0], -1, 4).gather(1, query)
        return boxes, torch.where(score > config.score_threshold, score, 0), best % classes

    def rois(self, image: Tensor) -> Regions:
        """What the model finds, with boxes in pixels of the image."""
        batch, factor = self.prepare(image if image.dim() == 4 else image[None])
        found = self.model.regions(batch)
        return replace(found, boxes=found.boxes / factor.flip(0).repeat(2).to(found.boxes))

    def prepare(self, images: Tensor) -> tuple[ImageList, Tensor]:
        """`batch_images` of pictures (N, 3, h, w) of one size, with the resize factors (2,) of all, y before x."""
        config = self.recipe.input
        shape = torch._shape_as_tensor(images)[2:].double()
        # Both sides at once: of a number and a tensor, or of two numbers, ONNX would take the quotient in float32.
        limits = torch.tensor([config.short_side, config.long_side], dtype=torch.float64)
        scale = (limits / shape.sort().values).amin()
        size = (shape * scale + 0.5).floor().clamp(min=1)  # halves up, as `input_size`
        pixels = (images.float() / 255 - self.mean) / self.std
        pixels = _resized(pixels, shape[1], size[1])
        pixels = _resized(pixels.transpose(-1, -2), shape[0], size[0]).transpose(-1, -2)
        bottom, right = (-size.long() % SIZE_DIVISOR).unbind()
        pixels = F.pad(pixels, [0, right, 0, bottom])  # type: ignore[list-item]  # in a trace, sizes are tensors
        return ImageList(pixels, size.expand(images.shape[0], -1)), size / shape


def _resized(pixels: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """`F.interpolate` (bilinear) of the last axis, of `length`, to `count`, () float64 both: each of the new pixels
    lies between two. ONNX's own Resize is some ten-thousandths of a pixel off in large pictures, which takes boxes
    along.

    Rounded to float32 where torch does, which multiplies and subtracts in one step.
    """
    ratio = (length / count).float().double()
    places = torch.arange(count.long()).double()  # type: ignore[call-overload]  # in a trace, sizes are tensors
    place = (ratio * (places + 0.5) - 0.5).float().clamp(min=0)
    first = place.long()
    second = torch.minimum(first + 1, length.long() - 1)
    share = (place - first.float()).to(pixels)
    return cast(Tensor, pixels[..., first] * (1 - share) + pixels[..., second] * share)


def traceable(detector: Detector) -> nn.Module | None:
    """The detector as a module over (image, texts, is_novel), in eval mode, that torch can trace; None if it has
    none.
    """
    name = detector.exportable
    return None if name is None else cast(nn.Module, resolve(name, "the detector's exportable")(detector))
