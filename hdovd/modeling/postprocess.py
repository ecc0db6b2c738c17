"""From RoI scores to detections (METHOD section 7).

R RoIs, C classes. Combining the two scores uses the base/novel split at test time; alpha = beta = 0 is the
split-blind result, which does not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from hdovd.config.recipe import InferenceConfig
from hdovd.modeling.base import RoIPredictions


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
    """Threshold, per-class NMS and the cap on detections of every image of a batch; what is found lies on the CPU.

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
        # batched_nms shifts the classes apart by the picture's size: with many classes, too far for pixels to be exact
        # in float32
        keep = batched_nms(b.double(), s.double(), k, config.nms)[: config.detections_per_image]
        kept.append((b[keep], s[keep], k[keep]))
    found = [len(s) for _, s, _ in kept]
    on_cpu = [torch.cat(parts).cpu().split(found) for parts in zip(*kept, strict=True)]
    return [Detections(*parts) for parts in zip(*on_cpu, strict=True)]
