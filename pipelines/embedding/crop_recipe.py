"""Which pixels a box stands for.

| shape | the pixels of a box |
|---|---|
| `box` | the box, widened outwards to whole pixels, cut to the image |
| `square` | the square of its longer side about its centre; black where that leaves the image |
| `square-inside` | the same square, moved into the image where it fits, axis by axis (as OADP does); black where it
does not fit |

`scales` make each of these larger or smaller about its centre before anything else; the embedding is the normalised
mean of those of all scales (ViLD: `box` at 1 and 1.5). Boxes are xyxy, absolute pixels; a recipe is part of the cache's
identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hdovd.core import HdovdError

if TYPE_CHECKING:
    import numpy as np


class Shape(StrEnum):
    BOX = "box"
    SQUARE = "square"
    SQUARE_INSIDE = "square-inside"


@dataclass(frozen=True, slots=True)
class CropRecipe:
    """Which pixels a box stands for: see the module's table."""

    shape: Shape = Shape.BOX
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise HdovdError(
                f"--crop-scales {','.join(map(str, self.scales))}: expected numbers above 0, such as 1 or 1,1.5"
            )

    @classmethod
    def parse(cls, shape: Shape, scales: str) -> CropRecipe:
        """From the words of a command line. Raises HdovdError for scales that are no numbers."""
        try:
            return cls(shape, tuple(float(scale) for scale in scales.split(",")))
        except ValueError:
            raise HdovdError(
                f"--crop-scales {scales}: expected numbers with commas between them, such as 1,1.5"
            ) from None

    def inputs(self) -> dict[str, Any]:
        """JSON values, a part of a product's key."""
        return {"shape": str(self.shape), "scales": list(self.scales)}

    @classmethod
    def from_inputs(cls, tree: dict[str, Any]) -> CropRecipe:
        """What `inputs` described. Raises HdovdError for anything else."""
        try:
            return cls(Shape(tree["shape"]), tuple(map(float, tree["scales"])))
        except (KeyError, TypeError, ValueError) as error:
            raise HdovdError(f"unknown crop recipe {tree}: another version of hdovd made it") from error

    def regions(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        """(n, 4) boxes -> (n * len(scales), 4) int64 xyxy, the scales of a box together; of a square shape also beyond
        the image.
        """
        import numpy as np  # here: the command line names recipes

        size = np.array([width, height], np.float64)
        low, high = boxes[:, None, :2].astype(np.float64), boxes[:, None, 2:].astype(np.float64)
        centre, half = (low + high) / 2, (high - low) / 2 * np.array(self.scales)[:, None]
        if self.shape is Shape.BOX:
            scaled = np.array(self.scales)[:, None] != 1
            first = np.clip(np.floor(np.where(scaled, centre - half, low)), 0, size - 1)
            last = np.clip(np.ceil(np.where(scaled, centre + half, high)), first + 1, size)
        else:
            side = np.maximum(1, np.round(2 * half.max(axis=2, keepdims=True)))
            first = np.round(centre - side / 2)
            if self.shape is Shape.SQUARE_INSIDE:
                first = np.where(side <= size, np.clip(first, 0, np.maximum(0, size - side)), first)
            last = first + side
        return np.concatenate([first, last], axis=2).astype(np.int64).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class DenseRecipe:
    """No crops: the box's part of one feature map of the whole picture, squashed to `side` x `side` pixels; None for
    the default.
    """

    side: int | None = None


PLAIN_BOX = CropRecipe()
