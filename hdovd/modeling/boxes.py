"""Boxes after the network: offsets to corners and back, how far they overlap, NMS of a batch, and detections from
scores (METHOD section 7).

The coder is torchvision's, except that no number is copied to the device: such a copy waits for all that the device
has still to do. NMS takes several images a call on a GPU, since the host waits for each call's result.

N images, M boxes of each, R RoIs, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import _utils
from torchvision.ops import batched_nms, nms

from hdovd.config.recipe import InferenceConfig
from hdovd.modeling.base import RoIPredictions


class BoxCoder(_utils.BoxCoder):
    """Offsets (n, 4) are (dx, dy, dw, dh), each times its weight: the centre's in sides of the anchor, the sides' as
    logarithms.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """(n, 4) boxes and (n, 4) anchors, both xyxy -> (n, 4) offsets."""
        weights = torch.tensor(self.weights, dtype=reference_boxes.dtype).to(reference_boxes.device, non_blocking=True)
        return cast(Tensor, _utils.encode_boxes(reference_boxes, proposals, weights))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """(n, 4) offsets and (n, 4) anchors -> (n, 4) boxes."""
        boxes = boxes.to(rel_codes.dtype)
        sides = boxes[:, 2:] - boxes[:, :2]
        wx, wy, ww, wh = self.weights
        shift = torch.stack([rel_codes[:, 0] / wx, rel_codes[:, 1] / wy], dim=1)
        growth = torch.stack([rel_codes[:, 2] / ww, rel_codes[:, 3] / wh], dim=1).clamp(max=self.bbox_xform_clip)
        centre, half = shift * sides + (boxes[:, :2] + 0.5 * sides), 0.5 * (growth.exp() * sides)
        return torch.cat([centre - half, centre + half], dim=1)


def limits(sizes: Sequence[tuple[int, int]] | Tensor, like: Tensor) -> Tensor:
    """(N, 4) width, height, width, height of pictures of these (height, width), for boxes to be clipped to."""
    return torch.as_tensor(sizes, dtype=like.dtype).to(like.device, non_blocking=True).flip(1).repeat(1, 2)


TINY = 1e-6  # the least area that is divided by, square pixels; released code


def overlap(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes (..., 4) xyxy that broadcast against each other; float32,
    under autocast too.
    """
    shared = _shared(one, two)
    union = (area(one) + area(two) - shared).clamp(min=TINY)
    iou = shared / union
    hull = torch.maximum(one[..., 2:], two[..., 2:]) - torch.minimum(one[..., :2], two[..., :2])
    around = hull.clamp(min=0).prod(dim=-1).clamp(min=TINY)
    return iou, iou - (around - union) / around


def covered(boxes: Tensor) -> Tensor:
    """The share of each box (..., N, 4) that each other covers, intersection over its own area: (..., N, N)."""
    return _shared(boxes[..., :, None, :], boxes[..., None, :, :]) / area(boxes)[..., :, None].clamp(min=TINY)


def area(boxes: Tensor) -> Tensor:
    """Square pixels (...) of boxes (..., 4) xyxy."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _shared(one: Tensor, two: Tensor) -> Tensor:
    low, high = torch.maximum(one[..., :2], two[..., :2]), torch.minimum(one[..., 2:], two[..., 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


MOST_AT_ONCE = (
    2**15
)  # boxes of a call on a GPU, whose table of a bit a pair takes 128 MiB: with their number the pairs grow as its square


def nms_of_images(boxes: Tensor, scores: Tensor, threshold: float, group: Tensor | None = None) -> Tensor:
    """NMS within each image, and there within each group.

    Args:
        boxes: (N, M, 4) xyxy. scores: (N, M). threshold: IoU over which the lower score is dropped.
        group: (N, M) int64, the group of each box, from 0 on; without groups all are compared.

    Returns:
        (n,) int64 places among all N M boxes of those that are kept; those of an image best first.
    """
    images, count = scores.shape
    part = torch.arange(images, device=scores.device)[:, None].expand_as(scores)
    if group is not None:
        part = part * (group.amax() + 1) + group
    if boxes.device.type == "cpu" or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return nms_of_parts(boxes.flatten(0, 1), scores.flatten(), part.flatten(), threshold)
    at_once = max(1, MOST_AT_ONCE // max(1, count))
    some = zip(range(0, images, at_once), *(rows.split(at_once) for rows in (boxes, scores, part)), strict=True)
    kept = [_nms_apart(b.flatten(0, 1), s.flatten(), p.flatten(), threshold) + first * count for first, b, s, p in some]
    return torch.cat(kept)


def _nms_apart(boxes: Tensor, scores: Tensor, part: Tensor, threshold: float) -> Tensor:
    """NMS (n,) of boxes (n, 4) that are moved so far apart that only those of a part overlap: in doubles, where pixels
    stay exact.
    """
    if not len(boxes):
        return part
    exact = boxes.double()
    return cast(Tensor, nms(exact + part[:, None] * (exact.amax() - exact.amin() + 1), scores.double(), threshold))


def nms_of_parts(boxes: Tensor, scores: Tensor, part: Tensor, threshold: float) -> Tensor:
    """NMS of boxes (n, 4) within each part, (n,) int64: the places of those that are kept, best first.

    In doubles: batched_nms shifts the parts apart by the picture's size, with many of them too far for pixels to be
    exact in float32.
    """
    if not torch.onnx.is_in_onnx_export():
        return batched_nms(boxes.double(), scores.double(), part, threshold)  # type: ignore[no-any-return]
    parts = torch.arange(F.pad(part, (0, 1)).amax() + 1)[:, None]  # type: ignore[call-overload]  # in a trace, sizes are tensors
    kept = OnnxNms.apply(boxes[None], scores.where(part == parts, NO_SCORE)[None], threshold)[:, 2]
    kept = kept.sort().values  # of equal scores the first, as torch has it
    return cast(Tensor, kept[scores[kept].sort(descending=True).indices])


NO_SCORE = -1.0  # less than any


class OnnxNms(torch.autograd.Function):
    """The operator that ONNX has for NMS in float32 within each part: boxes (1, n, 4), scores (1, P, n), NO_SCORE those
    of other parts -> (k, 3) int64, 0, the part and the place.
    """

    @staticmethod
    def forward(_: Any, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        """In a trace only the shape of what comes out counts."""
        return (scores > NO_SCORE).nonzero()

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float) -> Any:
        most, *limits = (g.op("Constant", value_t=torch.tensor([value])) for value in (2**31 - 1, threshold, NO_SCORE))
        return g.op("NonMaxSuppression", boxes, scores, most, *limits)


def best_places(scores: Tensor, most: int) -> Tensor:
    """The places of the `most` highest scores (..., n), best first; of equal ones the first."""
    if torch.onnx.is_in_onnx_export():  # its sort keeps the order of equal ones anyway, and has no word for it
        return scores.sort(dim=-1, descending=True).indices[..., :most]
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]


def taken(rows: Tensor, places: Tensor) -> Tensor:
    """Rows (N, A, X) at places (N, Q): (N, Q, X)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))


@dataclass(frozen=True, slots=True)
class Detections:
    """Best first: boxes (n, 4) xyxy pixels of the original image, scores (n,), labels (n,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def combine_scores(s1: Tensor, s2: Tensor, is_novel: Tensor, alpha: float, beta: float) -> Tensor:
    """Geometric mean of both scores per class, renormalised over classes and background.

    Base classes s1^(1-alpha) s2^alpha, novel classes s1^(1-beta) s2^beta, background s1.

    Args:
        s1: (R, C+1) softmax, background last. s2: (R, C) in 0..1. is_novel: (C,) bool.

    Returns:
        (R, C+1), rows sum to one.
    """
    share = torch.where(is_novel, beta, alpha).to(s1)
    combined = torch.cat([s1[:, :-1] ** (1 - share) * s2**share, s1[:, -1:]], dim=1)
    return combined / combined.sum(dim=1, keepdim=True)


def kept_places(boxes: Tensor, scores: Tensor, labels: Tensor, config: InferenceConfig) -> Tensor:
    """The places of an image's candidates (n,) that its detections are, best first: after the NMS within each class
    (none at 1), as many as are allowed.
    """
    most = config.detections_per_image
    return best_places(scores, most) if config.nms >= 1 else nms_of_parts(boxes, scores, labels, config.nms)[:most]


def detect(
    predictions: RoIPredictions, is_novel: Tensor, config: InferenceConfig, *, split_blind: bool = False
) -> Detections:
    """`detect_batch` of one image."""
    return detect_batch([predictions], is_novel, config, split_blind=split_blind)[0]


def detect_batch(
    predictions: list[RoIPredictions],
    is_novel: Tensor,
    config: InferenceConfig,
    *,
    split_blind: bool = False,
    wanted: int | None = None,
) -> list[Detections]:
    """Threshold, per-class NMS and the cap on detections of every image of a batch; what is found lies on the CPU. With
    `nms` at 1 there is no NMS.

    Of the classes only the first `wanted` are looked for; the others have taken their part of the scores.
    Without a distillation feature, or with `split_blind`, the classification score stands alone. Scores are combined
    and compared for the batch at once, and come from the device at once: NMS alone goes image by image.
    """
    counts = [len(p.boxes) for p in predictions]
    scores, boxes = torch.cat([p.class_probability for p in predictions]), torch.cat([p.boxes for p in predictions])
    seconds = [p.distillation_score for p in predictions if p.distillation_score is not None]
    if seconds and not split_blind:
        scores = combine_scores(scores, torch.cat(seconds), is_novel, config.alpha, config.beta)
    roi, label = (scores[:, :-1][:, :wanted] > config.score_threshold).nonzero(as_tuple=True)
    ends = torch.tensor([0, *counts], device=roi.device).cumsum(0)
    per_image = torch.searchsorted(roi, ends).diff().tolist()  # candidates; `nonzero` gives them RoI by RoI
    score, boxes = scores[roi, label], boxes[roi]
    kept = []
    for b, s, k in zip(boxes.split(per_image), score.split(per_image), label.split(per_image), strict=True):
        keep = kept_places(b, s, k, config)
        kept.append((b[keep], s[keep], k[keep]))
    found = [len(s) for _, s, _ in kept]
    on_cpu = [torch.cat(parts).cpu().split(found) for parts in zip(*kept, strict=True)]
    return [Detections(*parts) for parts in zip(*on_cpu, strict=True)]
