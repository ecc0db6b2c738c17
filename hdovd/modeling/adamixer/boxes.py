"""Boxes as AdaMixer moves them, (x, y, z, r), and their overlaps.

A box of centre (x, y) and sides (w, h), in pixels of the padded batch, is x, y, z = log2(sqrt(w h)), r = log2(h / w)
(arXiv 2203.16507, section 3.1). Everything is float32, under autocast too.
"""

import torch
from torch import Tensor

TINY = 1e-6  # the least area that is divided by, square pixels; released code


def to_xyzr(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy of positive sides -> (..., 4) x, y, z, r."""
    low, high = boxes[..., :2], boxes[..., 2:]
    width, height = (high - low).unbind(-1)
    z, r = (width * height).sqrt().log2(), (height / width).log2()
    return torch.cat([(low + high) / 2, z[..., None], r[..., None]], dim=-1)


def sides(xyzr: Tensor) -> Tensor:
    """(..., 4) x, y, z, r -> (..., 2) width and height, pixels."""
    z, half = xyzr[..., 2], xyzr[..., 3] / 2
    return 2.0 ** torch.stack([z - half, z + half], dim=-1)


def to_corners(xyzr: Tensor) -> Tensor:
    """(..., 4) x, y, z, r -> (..., 4) xyxy."""
    half = sides(xyzr) / 2
    return torch.cat([xyzr[..., :2] - half, xyzr[..., :2] + half], dim=-1)


def refine(xyzr: Tensor, deltas: Tensor) -> Tensor:
    """Boxes moved by (..., 4) deltas: the centre by parts of 2^z, z and r by addition (arXiv 2203.16507, section
    3.1)."""
    return torch.cat([xyzr[..., :2] + deltas[..., :2] * 2.0 ** xyzr[..., 2:3], xyzr[..., 2:] + deltas[..., 2:]], dim=-1)


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
