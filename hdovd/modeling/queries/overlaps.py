"""How far boxes overlap. Everything is float32, under autocast too."""

import torch
from torch import Tensor

TINY = 1e-6  # the least area that is divided by, square pixels; released code


def overlap(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes (..., 4) xyxy that broadcast against each other."""
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
