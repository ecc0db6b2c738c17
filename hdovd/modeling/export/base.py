"""The detector as one function of tensors alone, from a picture to detections, that torch can trace. Called by the stage `export_model`.

It is `Detector.predict` and `inference.detect` over the same weights, written so that a trace keeps what depends on the
data: sizes are tensors, nothing is a Python number that a picture decides, and no device is written into it. `exportable_rcnn` and
`adamixer.exportable` are the detectors that there are.
R RoIs, C classes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from hdovd.modeling.base import Detector
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.postprocess import combine_scores


class ExportableDetector(nn.Module):
    """One picture, any classes, detections: what detection needs of a trained model, which is put in eval mode. A detector's own says
    what it finds (`rois`) and how sure it is (`scores`)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.recipe = model.recipe
        config = model.recipe.input
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)
        model.eval()
        self.eval()

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: (3, h, w) uint8 RGB, of any size.
            texts: (C, D) float32 text embeddings of the classes asked for, of any length.
            is_novel: (C,) bool: classes that were not annotated in training (METHOD section 7). Without effect on a model that
                has one score alone.

        Returns:
            Best first: boxes (n, 4) xyxy pixels of `image`, scores (n,), labels (n,) int64, rows of `texts`.
        """
        boxes, c, d = self.rois(image)
        scores, second = self.scores(c, d, texts)
        if second is not None:
            scores = combine_scores(scores, second, is_novel, self.recipe.inference.alpha, self.recipe.inference.beta)
        return self._detections(boxes, scores[:, :-1])

    def rois(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What does not depend on the classes: boxes (R, 4) xyxy pixels of `image`; features (R, D) that are compared with the classes'
        texts, and those that distillation taught, if the model has them."""
        raise NotImplementedError

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of `rois`' features: s1 (R, C+1), background last, and s2 (R, C), as in METHOD section 7."""
        raise NotImplementedError

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`batch_images` of one: pixels (3, H, W), padded; size (2,) of the picture in them and resize factors (2,), y before x."""
        config = self.recipe.input
        shape = torch._shape_as_tensor(image)[1:].double()
        # Both sides at once: of a number and a tensor, or of two numbers, ONNX would take the quotient in float32.
        limits = torch.tensor([config.short_side, config.long_side], dtype=torch.float64)
        scale = (limits / shape.sort().values).amin()
        size = (shape * scale + 0.5).floor().clamp(min=1)  # halves up, as `input_size`
        height, width = size.long().unbind()
        pixels = _resized(image, shape, size, lambda some: (some.float() / 255 - self.mean) / self.std)
        right, bottom = -width % SIZE_DIVISOR, -height % SIZE_DIVISOR
        return F.pad(pixels, [0, right, 0, bottom]), size, size / shape  # type: ignore[list-item]  # in a trace, sizes are tensors

    def _detections(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`detect_batch` of one picture: scores (R, C)."""
        config = self.recipe.inference
        find = _OnnxClassNms.apply if torch.onnx.is_in_onnx_export() else class_nms
        roi, label = find(boxes, scores, config.nms, config.score_threshold).unbind(1)
        score = scores[roi, label]
        best = best_places(score, config.detections_per_image)
        return boxes[roi[best]], score[best], label[best]


def class_nms(boxes: Tensor, scores: Tensor, threshold: float, least: float) -> Tensor:
    """NMS within each class of all scores above `least`: (n, 2) RoI and label, RoI by RoI."""
    candidates = (scores > least).nonzero()
    roi, label = candidates.unbind(1)
    apart = boxes.double()[roi] + label.double()[:, None] * (torch.cat([boxes.double().flatten(), boxes.new_zeros(1)]).amax() + 1)
    kept: Tensor = nms(apart, scores[roi, label].double(), threshold)
    return candidates[kept.sort().values]


class _OnnxClassNms(torch.autograd.Function):
    """`class_nms` by the operator that ONNX has for it."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, threshold: float, least: float) -> Tensor:
        return class_nms(boxes, scores, threshold, least)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float, least: float) -> Any:
        def constant(value: Tensor) -> Any:
            return g.op("Constant", value_t=value)

        first = constant(torch.tensor([0]))
        by_class = g.op("Unsqueeze", g.op("Transpose", scores, perm_i=[1, 0]), first)
        found = g.op("NonMaxSuppression", g.op("Unsqueeze", boxes, first), by_class, constant(torch.tensor([2**31 - 1])),
                     constant(torch.tensor([threshold])), constant(torch.tensor([least])))  # (n, 3): picture, class, box
        roi, label = (g.op("Gather", found, constant(torch.tensor([column])), axis_i=1) for column in (2, 1))
        classes = g.op("Gather", g.op("Shape", scores), constant(torch.tensor([1])))
        place = g.op("Add", g.op("Mul", roi, classes), label)  # RoI by RoI, as equal scores are ordered by it
        size = g.op("Shape", found)
        count = g.op("Gather", size, constant(torch.tensor([0])))
        _, order = g.op("TopK", g.op("Squeeze", place, constant(torch.tensor([1]))), count, axis_i=0, largest_i=0, sorted_i=1, outputs=2)
        return g.op("Gather", g.op("Concat", roi, label, axis_i=1), order, axis_i=0)


def _resized(image: Tensor, shape: Tensor, size: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """`F.interpolate(prepare(image)[None], size, mode="bilinear")[0]`, from just the places between the pixels that it takes.

    ONNX's own Resize is some ten-thousandths of a pixel off in large pictures, which takes boxes along.

    Args:
        image: (3, h, w). shape: (2,) float64, h and w. size: (2,) float64, whole numbers, those of the result.
        prepare: a function of each pixel alone; what is left out does not go through it.
    """
    (top, bottom, down), (left, right, across) = (_taken(shape[axis], size[axis]) for axis in (0, 1))

    def row(lines: Tensor) -> Tensor:
        some = image[:, lines]
        one, other = prepare(some[:, :, left]), prepare(some[:, :, right])
        return one * (1 - across.to(one)) + other * across.to(one)

    upper, lower = row(top), row(bottom)
    return upper * (1 - down.to(upper)[:, None]) + lower * down.to(upper)[:, None]


def _taken(length: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `count` pixels along an axis of `length`: the two that it lies between, and how far from the first, in 0..1.

    Rounded to float32 where torch does, which multiplies and subtracts in one step.
    """
    ratio = (length / count).float().double()
    places = torch.arange(count.long()).double()  # type: ignore[call-overload]  # in a trace, sizes are tensors
    place = (ratio * (places + 0.5) - 0.5).float().clamp(min=0)
    first = place.long()
    return first, torch.minimum(first + 1, length.long() - 1), place - first.float()


def clip(boxes: Tensor, limit: Tensor) -> Tensor:
    """Boxes (n, 4) inside (4,) width, height, width, height."""
    return torch.minimum(boxes.clamp(min=0), limit)


def at_most(rows: Tensor, most: int) -> Tensor:
    """The lesser of the length of rows and `most`, as a trace keeps it."""
    return torch._shape_as_tensor(rows)[0].clamp(max=most)


def best_places(scores: Tensor, most: int) -> Tensor:
    """The places of the `most` highest scores, best first; of equal ones the first."""
    if torch.onnx.is_in_onnx_export():  # its sort keeps the order of equal ones anyway, and has no word for it
        return scores.sort(descending=True).indices[:most]
    return scores.sort(descending=True, stable=True).indices[:most]
