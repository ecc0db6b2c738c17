"""The instance level from one CLIP pass a picture: `hdovd extract-clip --instance-teacher dense`. See
`teachers.dense`."""

from typing import Any

import numpy as np
import torch

from hdovd.core.errors import HdovdError
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.embedding.crops import Batch
from hdovd.pipelines.embedding.embedders import Embedder, Pictures
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.dense import DenseClip, near_side, scale_boxes
from hdovd.pipelines.teachers.openclip import ClipTeacher

DEFAULT_SIDES = 3  # of the crop input: 672 pixels where that has 224


class DenseBoxes(Embedder):
    """A row a box: its part of the feature map of the picture, squashed to `side` x `side` pixels.

    A batch has as many pictures as have the pixels of a batch of crops, one at the least, and all of their boxes.
    """

    teacher: ClipTeacher

    def __init__(self, teacher: Teacher, pictures: Pictures, side: int | None = None) -> None:
        """`side`: None for about DEFAULT_SIDES times that of the crop input. Raises HdovdError for a model that is no
        CLIP of open_clip's, or has no dense features.
        """
        if not isinstance(teacher, ClipTeacher):
            raise HdovdError(f"--instance-teacher dense needs a CLIP of open_clip's, not a {type(teacher).__name__}")
        super().__init__(teacher, pictures)
        self._side = side or near_side(teacher.model.visual, DEFAULT_SIDES * max(teacher.input_size))
        self._clip = DenseClip(teacher.model.visual, self._side)
        self._transform = teacher.transform.squashed(self._side)
        self.fit, self.input_size = self._transform.fit, self._transform.size

    def inputs(self) -> dict[str, Any]:
        return {"preprocessing": self._transform.inputs(), "dense": self._clip.identity}

    def groups(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        starts = np.flatnonzero(np.diff(self.images_of(rows), prepend=-1))
        return np.split(rows, starts[:: self.places(size)][1:]) if len(rows) else []

    def places(self, size: int) -> int:
        height, width = self.teacher.input_size
        return max(1, round(size * height * width / self._side**2))

    @torch.inference_mode()
    def encode(self, batch: Batch) -> np.ndarray:
        pixels, boxes = self._transform.normalise(batch.pixels.to(self.teacher.device, non_blocking=True)), batch.boxes

        def some(start: int, stop: int) -> np.ndarray:
            with self.teacher.autocast():
                return (
                    self._clip.embed_boxes(pixels[start:stop], [torch.from_numpy(box) for box in boxes[start:stop]])
                    .cpu()
                    .numpy()
                )

        return self.teacher.in_memory(some, 0, len(pixels))

    def cuts(self, image: ImageBoxes, rows: np.ndarray) -> dict[str, np.ndarray]:
        boxes = torch.from_numpy(self.pictures.box[rows].astype(np.float32))
        return {"boxes": scale_boxes(boxes, image.width, image.height, self._side).numpy()}
