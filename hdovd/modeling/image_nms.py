"""NMS of the images of a batch, each for itself: one call of the kernel for several on a GPU, as the host waits for
each call's result.

N images, M boxes of each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

MOST_AT_ONCE = (
    2**15
)  # boxes of a call on a GPU, whose table of a bit a pair takes 128 MiB: with their number the pairs grow as its square


def nms_of_images(boxes: Tensor, scores: Tensor, threshold: float, groups: Sequence[int] = ()) -> Tensor:
    """NMS within each image, and there within each group.

    Args:
        boxes: (N, M, 4) xyxy. scores: (N, M). threshold: IoU over which the lower score is dropped.
        groups: how many boxes of an image, one after the other, are a group each; without groups all are compared.

    Returns:
        (n,) int64 places among all N M boxes of those that are kept; those of an image best first.
    """
    images, count = scores.shape
    part = torch.arange(images, device=scores.device)[:, None].expand_as(scores)
    if groups:
        part = part * len(groups) + torch.cat(
            [torch.full((n,), group, device=scores.device) for group, n in enumerate(groups)]
        )
    if boxes.device.type == "cpu":
        return batched_nms(boxes.flatten(0, 1).double(), scores.flatten().double(), part.flatten(), threshold)  # type: ignore[no-any-return]
    kept, at_once = [], max(1, MOST_AT_ONCE // max(1, count))
    for first in range(0, images, at_once):
        some = slice(first, first + at_once)
        kept.append(
            _nms_apart(boxes[some].flatten(0, 1), scores[some].flatten(), part[some].flatten(), threshold)
            + first * count
        )
    return torch.cat(kept)


def _nms_apart(boxes: Tensor, scores: Tensor, part: Tensor, threshold: float) -> Tensor:
    """NMS (n,) of boxes (n, 4) that are moved so far apart that only those of a part overlap: in doubles, where pixels
    stay exact.
    """
    if not len(boxes):
        return part
    exact = boxes.double()
    kept: Tensor = nms(exact + part[:, None] * (exact.amax() - exact.amin() + 1), scores.double(), threshold)
    return kept
