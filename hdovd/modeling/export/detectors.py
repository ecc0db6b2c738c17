"""The detector as one function of tensors alone, from a picture to detections, that torch can trace.

It is `Detector.predict` and `boxes.detect` over the same weights, written so that a trace keeps what depends on the
data: sizes are tensors, nothing is a Python number that a picture decides, and no device is written into it.
`traceable` is the way in. R RoIs or queries, C classes, D embedding size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from hdovd.core.registry import resolve
from hdovd.modeling.adamixer.decoder import SamplingTable, to_corners, to_xyzr
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.adamixer.proposals import DensePredictions, by_rank
from hdovd.modeling.base import Detector
from hdovd.modeling.batching import SIZE_DIVISOR
from hdovd.modeling.boxes import best_places, combine_scores, detect
from hdovd.modeling.faster_rcnn.model import CODER, FasterRCNN, roi_scores
from hdovd.modeling.queries.detector import QueryDetector
from hdovd.modeling.queries.scores import query_scores, with_objectness
from hdovd.modeling.rpn import ExactAnchors
from hdovd.modeling.rtdetr.model import RTDETR


class Found(NamedTuple):
    """What does not depend on the classes: boxes (R, 4) xyxy pixels of the image; features (R, D) that are compared
    with the classes' texts, and those that distillation taught, if the model has them; and, if it has it, the
    probability (R,) that both scores are multiplied by.
    """

    boxes: Tensor
    c: Tensor
    d: Tensor | None
    objectness: Tensor | None = None


class ExportableDetector(nn.Module):
    """One picture, any classes, detections: what detection needs of a trained model, which is put in eval mode. A
    detector's own says what it finds (`rois`) and how sure it is (`scores`).
    """

    mean: Tensor
    std: Tensor
    batches = False  # whether it takes a batch of pictures of one size too

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
            is_novel: (C,) bool: classes that were not annotated in training (METHOD section 7). Without effect on a
                model that has one score alone.

        Returns:
            Best first: boxes (n, 4) xyxy pixels of `image`, scores (n,), labels (n,) int64, rows of `texts`.
        """
        return self._detections(*self.all_scores(image, texts, is_novel))

    def all_scores(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) and their scores (R, C)."""
        boxes, c, d, objectness = self.rois(image)
        scores, second = self.scores(c, d, texts)
        if objectness is not None:
            scores, second = with_objectness(scores, second, objectness)
        if second is not None:
            scores = combine_scores(scores, second, is_novel, self.recipe.inference.alpha, self.recipe.inference.beta)
        return boxes, scores[:, :-1]

    def rois(self, image: Tensor) -> Found:
        raise NotImplementedError

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of `rois`' features: s1 (R, C+1), background last, and s2 (R, C), as in METHOD section 7."""
        raise NotImplementedError

    def prepare(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`batch_images` of one, or of pictures (N, 3, h, w) of one size: pixels (3, H, W), padded; size (2,) of a
        picture in them and resize factors (2,), y before x.
        """
        config = self.recipe.input
        shape = torch._shape_as_tensor(image)[-2:].double()
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
        if config.nms >= 1:
            return top_detections(boxes, scores, config.score_threshold, config.detections_per_image)
        find = _OnnxClassNms.apply if torch.onnx.is_in_onnx_export() else class_nms
        roi, label = find(boxes, scores, config.nms, config.score_threshold).unbind(1)
        score = scores[roi, label]
        best = best_places(score, config.detections_per_image)
        return boxes[roi[best]], score[best], label[best]


def top_detections(boxes: Tensor, scores: Tensor, least: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` highest scores (R, C) above `least`, best first: boxes (n, 4), scores (n,), labels (n,) int64."""
    flat, classes = scores.flatten(), torch._shape_as_tensor(scores)[1].clamp(min=1)
    best = best_places(flat, most)
    best = best[flat[best] > least]
    return boxes[best // classes], flat[best], best % classes


def class_nms(boxes: Tensor, scores: Tensor, threshold: float, least: float) -> Tensor:
    """NMS within each class of all scores above `least`: (n, 2) RoI and label, RoI by RoI."""
    candidates = (scores > least).nonzero()
    roi, label = candidates.unbind(1)
    apart = boxes.double()[roi] + label.double()[:, None] * (
        torch.cat([boxes.double().flatten(), boxes.new_zeros(1)]).amax() + 1
    )
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
        found = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, first),
            by_class,
            constant(torch.tensor([2**31 - 1])),
            constant(torch.tensor([threshold])),
            constant(torch.tensor([least])),
        )  # (n, 3): picture, class, box
        roi, label = (g.op("Gather", found, constant(torch.tensor([column])), axis_i=1) for column in (2, 1))
        classes = g.op("Gather", g.op("Shape", scores), constant(torch.tensor([1])))
        place = g.op("Add", g.op("Mul", roi, classes), label)  # RoI by RoI, as equal scores are ordered by it
        size = g.op("Shape", found)
        count = g.op("Gather", size, constant(torch.tensor([0])))
        _, order = g.op(
            "TopK",
            g.op("Squeeze", place, constant(torch.tensor([1]))),
            count,
            axis_i=0,
            largest_i=0,
            sorted_i=1,
            outputs=2,
        )
        return g.op("Gather", g.op("Concat", roi, label, axis_i=1), order, axis_i=0)


def _resized(image: Tensor, shape: Tensor, size: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """`F.interpolate(prepare(image)[None], size, mode="bilinear")[0]`, from just the places between the pixels that it
    takes.

    ONNX's own Resize is some ten-thousandths of a pixel off in large pictures, which takes boxes along.

    Args:
        image: (..., h, w). shape: (2,) float64, h and w. size: (2,) float64, whole numbers, those of the result.
        prepare: a function of each pixel alone; what is left out does not go through it.
    """
    (top, bottom, down), (left, right, across) = (_taken(shape[axis], size[axis]) for axis in (0, 1))

    def row(lines: Tensor) -> Tensor:
        some = image[..., lines, :]
        one, other = prepare(some[..., left]), prepare(some[..., right])
        return one * (1 - across.to(one)) + other * across.to(one)

    upper, lower = row(top), row(bottom)
    return upper * (1 - down.to(upper)[:, None]) + lower * down.to(upper)[:, None]


def _taken(length: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `count` pixels along an axis of `length`: the two that it lies between, and how far from the first,
    in 0..1.

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


class ExportableQueries(ExportableDetector):
    """What detectors of queries have in common: their last stage's features and scores."""

    backgrounds: Tensor
    object_text: Tensor

    def __init__(self, model: QueryDetector) -> None:
        super().__init__(model)
        self.backbone, self.last, self.adapters = model.backbone, model.stage(-1), model.adapters
        self.logit_scale, self.has_second = model.config.decoder.logit_scale, model.recipe.loss.uses_pseudo_boxes
        self.register_buffer("backgrounds", model.backgrounds(model.background).detach(), persistent=False)
        self.register_buffer("object_text", model.object_text, persistent=False)

    def found(self, content: Tensor, boxes: Tensor, objectness: Tensor | None = None) -> Found:
        """The last stage's queries: the class feature in text space, as the classifier and as the distillation move
        it.
        """
        c = self.last.describe(content)
        distilled = self.adapters.distilled(c) if self.has_second else None
        return Found(boxes, self.adapters.classified(c), distilled, objectness)

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        scales = self.logit_scale, self.recipe.inference.distillation_scale
        return query_scores(c, d, texts, self.backgrounds, *scales)


class ExportableAdaMixer(ExportableQueries):
    """`AdaMixer.predict` of one picture."""

    def __init__(self, model: AdaMixer) -> None:
        super().__init__(model)
        self.config, self.strides = model.config, model.strides
        self.norms, self.proposals, self.stages = model.norms, model.proposals, model.stages

    def rois(self, image: Tensor) -> Found:
        pixels, _, factor = self.prepare(image)
        maps = [norm(m) for norm, m in zip(self.norms, self.backbone(pixels[None]).values(), strict=True)]
        trunk = self.proposals.trunk(maps[1:])
        start = self._start(self.proposals.main(trunk, self.strides[1:], self.object_text), trunk)[None]
        table = SamplingTable(maps[:-1], self.strides[:-1])
        content, xyzr = self.proposals.content(table, start), to_xyzr(start)
        for stage in self.stages:
            content, xyzr, _ = stage(table, content, xyzr)
        return self.found(content[0], to_corners(xyzr[0]) / torch.cat([factor.flip(0), factor.flip(0)]).to(xyzr))

    def _start(self, dense: DensePredictions, maps: list[Tensor]) -> Tensor:
        """`QueryProposals.candidates` and `choose` of one picture: (R, 4) xyxy."""
        probability, boxes = dense.probability[0], dense.boxes[0]
        counts = torch.stack([torch._shape_as_tensor(m)[2:].prod() for m in maps])
        ends = counts.cumsum(0)
        chosen = [
            best_places(probability[end - count : end], self.config.proposals.pre_nms) + (end - count)
            for count, end in zip(counts, ends, strict=True)
        ]
        best = torch.cat(chosen)
        probability, boxes = probability[best], boxes[best]
        exact = torch.float32 if torch.onnx.is_in_onnx_export() else torch.float64  # ONNX has no other NMS
        kept = nms(boxes.to(exact), probability.to(exact), self.config.proposals.nms)
        distinct = torch.zeros_like(probability).index_fill(0, kept, 1.0) * probability > 0
        return boxes[best_places(by_rank(probability, distinct), self.config.decoder.queries)]


_MANY_BOXES = 1000  # where there are more, torchvision's batched_nms goes class by class; else it shifts them apart
_SMALLEST = 1e-3  # pixels; torchvision's RPN drops proposals with a shorter side


class ExportableFasterRCNN(ExportableDetector):
    """`FasterRCNN.predict` of one picture."""

    backgrounds: Tensor

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__(model)
        self.backbone, self.rpn, self.pool, self.head = model.backbone, model.rpn, model.pool, model.head
        self.register_buffer("backgrounds", model.backgrounds(model.background[None]).detach(), persistent=False)
        for level, anchors in enumerate(model.rpn.anchor_generator.cell_anchors):
            self.register_buffer(f"anchors{level}", anchors.float().clone(), persistent=False)

    def rois(self, image: Tensor) -> Found:
        """c, and d if the model has it."""
        pixels, size, factor = self.prepare(image)
        features = self.backbone(pixels[None])
        limit = torch.cat([size.flip(0), size.flip(0)]).to(pixels)
        proposals = self._proposals(features, pixels.shape, limit)
        deltas, c, r = self.head(self._pooled(features, proposals))
        boxes = clip(CODER.decode_single(deltas, proposals), limit)
        return Found(boxes / torch.cat([factor.flip(0), factor.flip(0)]).to(boxes), c, self.head.distill(r))

    def scores(self, c: Tensor, d: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor | None]:
        return roi_scores(c, d, texts, self.backgrounds, self.recipe)

    def _pooled(self, features: dict[str, Tensor], rois: Tensor) -> Tensor:
        """`PyramidRoIAlign.forward` of one picture: how many RoIs each level has is not known when it is traced."""
        level_of, indexed = self.pool.level_of(rois), torch.cat([torch.zeros_like(rois[:, :1]), rois], dim=1)
        rows = [(level_of == level).nonzero().flatten() for level in self.pool.levels]
        crops = torch.cat(
            [self.pool.crop(features, level, indexed[r]) for level, r in zip(self.pool.levels, rows, strict=True)]
        )
        return crops.index_select(0, torch.cat(rows).argsort())

    def _proposals(self, features: dict[str, Tensor], shape: torch.Size, limit: Tensor) -> Tensor:
        """The RPN's `filter_proposals`: (R, 4) pixels of the batch, best first."""
        rpn = self.rpn
        boxes, scores = [], []
        for level, (logits, deltas) in enumerate(zip(*rpn.head(list(features.values())), strict=True)):
            anchors = self._anchors(level, logits, shape)
            logits = logits[0].permute(1, 2, 0).flatten()
            most = torch._shape_as_tensor(logits)[0].clamp(max=rpn.pre_nms_top_n())  # as a trace keeps it
            best = logits.topk(most).indices
            deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            level_boxes = clip(rpn.box_coder.decode_single(deltas[best], anchors[best]), limit)
            keep = ((level_boxes[:, 2:] - level_boxes[:, :2]).amin(dim=1) >= _SMALLEST).nonzero().flatten()
            boxes.append(level_boxes[keep])
            scores.append(logits[best][keep].sigmoid())
        together = torch.cat([torch.cat(boxes), torch.zeros_like(limit[None])])  # one more, or there may be no largest
        few = torch._shape_as_tensor(together)[0] - 1 <= _MANY_BOXES
        shift = few.to(limit) * (together.amax() + 1)
        kept = [
            nms(b + level * shift, s, rpn.nms_thresh) for level, (b, s) in enumerate(zip(boxes, scores, strict=True))
        ]
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
        sizes = size.to(pixels).expand(pixels.shape[0], -1)
        found = self.network(self.backbone(pixels), sizes, whole, self.object_text)
        content = found.contents[-1].flatten(0, 1)
        boxes = found.boxes[-1].flatten(0, 1) / torch.cat([factor.flip(0), factor.flip(0)]).to(pixels)
        return self.found(content, boxes, self.last.object_logits(content).sigmoid())


def traceable(detector: Detector) -> nn.Module:
    """The detector as a module over (image, texts, is_novel), in eval mode: one that torch can trace, if it has one."""
    if detector.exportable is None:
        return _OnePicture(detector)
    return cast(nn.Module, resolve(detector.exportable, "the detector's exportable")(detector))


class _OnePicture(nn.Module):
    """`Detector.predict` and `detect` of one picture."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = detect(self.detector.predict([image], texts)[0], is_novel, self.detector.recipe.inference)
        return found.boxes, found.scores, found.labels
