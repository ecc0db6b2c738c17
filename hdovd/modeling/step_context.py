"""What the detector has at hand in a training step: the one argument of every level's loss, and of losses that a recipe
adds.

N images of this process, R RoIs, P of them positive, B boxes (image by image, base before pseudo), K base classes, C
pyramid channels, D embedding size.
"""

from dataclasses import dataclass

from torch import Tensor

from hdovd.data.targets import Targets


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of one process, before any loss of it.

    features: pyramid maps (N, C, h, w) by level name; level "5" has stride 2^5, "pool" is the one pooled from the last.
    image_sizes: (height, width) pixels of each picture in the padded batch; boxes and RoIs are in the same pixels.
    targets: boxes and cached rows of each image, with the pseudo boxes that are used. texts: (K, D) base classes.
    rois: (R_i, 4) xyxy each. box_of_roi: (R,) int64, the box in 0..B-1 that a positive RoI belongs to, or -1.
    deltas: (R, 4) predicted offsets. c: (R, D) classification feature. d: (P, D) distillation feature of the P positive
    RoIs, those with a box, in their order; None if the recipe does without the instance level.
    """

    features: dict[str, Tensor]
    image_sizes: list[tuple[int, int]]
    targets: list[Targets]
    texts: Tensor
    rois: list[Tensor]
    box_of_roi: Tensor
    deltas: Tensor
    c: Tensor
    d: Tensor | None
