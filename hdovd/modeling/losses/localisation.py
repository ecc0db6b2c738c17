"""The losses of the object localisation network (OLN, arXiv 2108.06753, section 3): how well a box fits, never what it
holds.

Pure functions. n boxes, encoded against anchors or RoIs: offsets (n, 4) as (dx, dy, dw, dh), with the centre's in sides
of the anchor and the sides' as logarithms (arXiv 1506.01497, equation 2), unit weights.
"""

import torch
from torch import Tensor

LARGEST_GROWTH = 4.0  # of a side, as a logarithm: beyond it exp() leaves the range in which float32 counts


def centerness(offsets: Tensor) -> Tensor:
    """How central an anchor's centre lies in a box: sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)).

    l, r, t and b are the distances of the anchor's centre from the box's sides (FCOS, arXiv 1904.01355, equation 3).

    Args:
        offsets: (n, 4) of the boxes from the anchors.

    Returns:
        (n,) in 0..1; 0 where the centre lies outside of the box.
    """
    away = (
        2 * offsets[:, :2] * (-offsets[:, 2:]).clamp(max=LARGEST_GROWTH).exp()
    ).abs()  # from the middle, in halves of the box's side
    return ((1 - away).clamp(min=0) / (1 + away)).prod(dim=1).sqrt()


def iou_of_offsets(one: Tensor, two: Tensor) -> Tensor:
    """IoU (n,) of boxes that are encoded against the same anchors: two times (n, 4) offsets."""
    sizes = [o[:, 2:].clamp(max=LARGEST_GROWTH).exp() for o in (one, two)]
    corners = [(o[:, :2] - size / 2, o[:, :2] + size / 2) for o, size in zip((one, two), sizes, strict=True)]
    overlap = (
        (torch.minimum(corners[0][1], corners[1][1]) - torch.maximum(corners[0][0], corners[1][0]))
        .clamp(min=0)
        .prod(dim=1)
    )
    return overlap / (sizes[0].prod(dim=1) + sizes[1].prod(dim=1) - overlap)


def iou_loss(offsets: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """The sum of 1 - IoU of predicted and wanted boxes, divided by `count`.

    Args:
        offsets, targets: (n, 4) from the same anchors. count: ().
    """
    return (1 - iou_of_offsets(offsets, targets)).sum() / count


def offset_loss(offsets: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """The sum of absolute differences of (n, 4) offsets and (n, 4) targets, divided by `count`."""
    return (offsets - targets).abs().sum() / count


def quality_loss(logits: Tensor, quality: Tensor, count: Tensor) -> Tensor:
    """The sum of absolute differences of sigmoid(logits) and what they are to say, divided by `count`.

    Args:
        logits: (n,). quality: (n,) in 0..1, a centerness or an IoU. count: ().
    """
    return (logits.sigmoid() - quality).abs().sum() / count
