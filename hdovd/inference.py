"""From RoI scores to detections (METHOD section 7).

R RoIs, C classes. Combining the two scores uses the base/novel split at test time; alpha = beta = 0 is the
split-blind result, which does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from hdovd.config import InferenceConfig
from hdovd.faster_rcnn import RoIPredictions


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


def detect(predictions: RoIPredictions, is_novel: Tensor, config: InferenceConfig, *, split_blind: bool = False) -> Detections:
    """Threshold, per-class NMS and the cap on detections of one image.

    Without a distillation feature, or with `split_blind`, the classification score stands alone.
    """
    scores = predictions.class_probability
    if predictions.distillation_score is not None and not split_blind:
        scores = combine_scores(scores, predictions.distillation_score, is_novel, config.alpha, config.beta)
    roi, label = (scores[:, :-1] > config.score_threshold).nonzero(as_tuple=True)
    score, boxes = scores[roi, label], predictions.boxes[roi]
    keep = batched_nms(boxes, score, label, config.nms)[: config.detections_per_image]
    return Detections(boxes[keep], score[keep], label[keep])
