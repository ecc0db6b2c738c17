"""What one training image brings to the detector, and which of its pseudo boxes are used.

n base boxes, m pseudo boxes, D embedding size. Boxes are xyxy in pixels of the image as it stands (original,
then resized by the detector). All embeddings are L2-normalised float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """The boxes of one image and the cached rows that belong to them, row by row.

    boxes (n, 4), labels (n,) int64 in 0..K-1, embeddings (n, D) image embeddings of the base boxes;
    pseudo_boxes (m, 4) best first, pseudo_embeddings (m, D) image embeddings v, pseudo_texts (m, D) text
    embeddings u; image_embedding (D,).
    """

    boxes: Tensor
    labels: Tensor
    embeddings: Tensor
    pseudo_boxes: Tensor
    pseudo_embeddings: Tensor
    pseudo_texts: Tensor
    image_embedding: Tensor

    def to(self, device: torch.device | str) -> Targets:
        return Targets(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))

    @property
    def all_boxes(self) -> Tensor:
        """(n + m, 4), base before pseudo."""
        return torch.cat([self.boxes, self.pseudo_boxes])

    def flipped(self, width: int) -> Targets:
        """Mirrored left to right in an image of `width` pixels; rows keep their places."""
        return replace(self, boxes=flip_boxes(self.boxes, width), pseudo_boxes=flip_boxes(self.pseudo_boxes, width))

    def scaled(self, x: float, y: float) -> Targets:
        """All coordinates multiplied by the resize factors of the two axes."""
        factor = self.boxes.new_tensor([x, y, x, y])
        return replace(self, boxes=self.boxes * factor, pseudo_boxes=self.pseudo_boxes * factor)

    def with_best_pseudo_boxes(self, min_side: float, most: int | None) -> Targets:
        """Keeps the first `most` pseudo boxes (None: all) with both sides over `min_side` pixels (METHOD section 2)."""
        large = ((self.pseudo_boxes[:, 2:] - self.pseudo_boxes[:, :2]) > min_side).all(dim=1)
        keep = large.nonzero().flatten()[:most]
        return replace(self, pseudo_boxes=self.pseudo_boxes[keep], pseudo_embeddings=self.pseudo_embeddings[keep],
                       pseudo_texts=self.pseudo_texts[keep])


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes (n, 4) xyxy mirrored left to right in an image of `width` pixels."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
