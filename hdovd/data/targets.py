"""What one training image brings to the detector, and which of its pseudo boxes are used.

n base boxes, m pseudo boxes, D embedding size. Boxes are xyxy in pixels of the image as it stands (original,
then resized by the detector). All embeddings are L2-normalised float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """The boxes of one image and the cached rows that belong to them, row by row.

    boxes (n, 4), labels (n,) int64 in 0..K-1, embeddings (n, D) image embeddings of the base boxes;
    pseudo_boxes (m, 4) best first, pseudo_embeddings (m, D) image embeddings v, pseudo_texts (m, D) text
    embeddings u; image_embedding (D,). judged (K,) bool: of federated annotations, the base classes all of whose
    objects in the image have a box, or that are known not to be there; None: all are.
    """

    boxes: Tensor
    labels: Tensor
    embeddings: Tensor
    pseudo_boxes: Tensor
    pseudo_embeddings: Tensor
    pseudo_texts: Tensor
    image_embedding: Tensor
    judged: Tensor | None = None

    def to(self, device: torch.device | str) -> "Targets":
        """The same, on a device."""
        parts = ((name, getattr(self, name)) for name in self.__slots__)
        return Targets(**{name: part.to(device, non_blocking=True) for name, part in parts if part is not None})

    @property
    def all_boxes(self) -> Tensor:
        """(n + m, 4), base before pseudo."""
        return torch.cat([self.boxes, self.pseudo_boxes])

    def flipped(self, width: int) -> "Targets":
        """Mirrored left to right in an image of `width` pixels; rows keep their places."""
        return replace(self, boxes=flip_boxes(self.boxes, width), pseudo_boxes=flip_boxes(self.pseudo_boxes, width))

    def scaled(self, x: float, y: float) -> "Targets":
        """All coordinates multiplied by the resize factors of the two axes."""
        return scale_all([self], [(x, y)])[0]

    def with_first_pseudo_boxes(self, most: int | None) -> "Targets":
        """Keeps the first `most` pseudo boxes; None: all."""
        return replace(
            self,
            pseudo_boxes=self.pseudo_boxes[:most],
            pseudo_embeddings=self.pseudo_embeddings[:most],
            pseudo_texts=self.pseudo_texts[:most],
        )


def scale_all(targets: Sequence[Targets], factors: Sequence[tuple[float, float]]) -> list[Targets]:
    """The targets of a batch, each multiplied by the (x, y) resize factors of its image."""
    boxes = targets[0].boxes
    rows = torch.tensor([(x, y, x, y) for x, y in factors], dtype=boxes.dtype).to(boxes.device, non_blocking=True)
    return [
        replace(t, boxes=t.boxes * row, pseudo_boxes=t.pseudo_boxes * row) for t, row in zip(targets, rows, strict=True)
    ]


def with_large_pseudo_boxes(targets: Sequence[Targets], min_side: float) -> list[Targets]:
    """The targets of a batch with those pseudo boxes that have both sides over `min_side` pixels. The host waits for
    the device once.
    """
    boxes = torch.cat([t.pseudo_boxes for t in targets])
    large = ((boxes[:, 2:] - boxes[:, :2]) > min_side).all(dim=1).cpu()
    counts = [int(own.sum()) for own in large.split([len(t.pseudo_boxes) for t in targets])]
    rows = large.nonzero().flatten().to(boxes.device, non_blocking=True)
    tables = (boxes, torch.cat([t.pseudo_embeddings for t in targets]), torch.cat([t.pseudo_texts for t in targets]))
    parts = zip(*(table[rows].split(counts) for table in tables), strict=True)
    return [
        replace(t, pseudo_boxes=own, pseudo_embeddings=embeddings, pseudo_texts=texts)
        for t, (own, embeddings, texts) in zip(targets, parts, strict=True)
    ]


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes (n, 4) xyxy mirrored left to right in an image of `width` pixels."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
