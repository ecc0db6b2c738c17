"""Which of a network's boxes become proposals: the largest overlap with a base box, the shortest side, the lowest score
and the number an image, those that are not given chosen by base boxes alone.

A rehearsal tells what becomes of objects that nobody labelled: a network that is trained as the one that proposes, but
without the boxes of every other base class, which are then to it what novel classes are. A choice is measured by how
many of their boxes its proposals find: R, the recall. B proposals an image are what the same choice keeps of the
network that proposes, with all base boxes known. Of these, at most as many lie on objects as there are
unlabelled objects, n, and the others lie on none. n is not known, but n <= B / R if unlabelled objects are found as
often as held-out ones: the least B / R of all choices stands for it. The choice made is that of the highest F2 of
finding unlabelled objects, 5 n R / (B + 4 n), in which recall counts twice: training weighs a box by how likely its
label is, so that one on nothing costs less than an object that is taught to be background.

Without a rehearsal, as with a checkpoint that has none beside it, classes are held out in turn that the network has
learnt from. It scores their boxes higher than those of other objects, the more so the longer it was trained: n comes
out too low, and proposals too few.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from hdovd.pipelines.proposals.config import ProposeConfig

OVERLAPS = (0.05, 0.1, 0.2, 0.3, 0.5)
SCORES = tuple(round(0.05 * k, 2) for k in reversed(range(19)))  # of equal choices the strictest
TOPS = (1, 2, 3, 5, 10, 20)
SIDE_QUANTILES = (0.0, 0.02)  # of the shorter sides of base boxes
LEAST_SIDE = 8.0  # pixels
FOLDS = 4  # of the base classes, without a rehearsal
FOUND_IOU = 0.5
RECALL_COUNTS = 2.0  # times as much as precision
LEAST_RECALL = 0.3  # of a choice that says how many objects there are: fewer are too few to tell
TO_CHOOSE_BY = 400  # images, evenly spaced


class Example(NamedTuple):
    """A picture to choose by: boxes (n, 4) and scores (n,) of the network, base boxes (b, 4) and their labels (b,);
    `rehearsed`: boxes and scores of the rehearsal, if there is one, and which base boxes (b,) bool it never saw.
    """

    boxes: Tensor
    scores: Tensor
    base: Tensor
    labels: Tensor
    rehearsed: tuple[Tensor, Tensor, Tensor] | None = None

    def trials(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (n, 4) and scores (n,), and which base boxes (b,) bool count as unlabelled."""
        if self.rehearsed is not None:
            return [self.rehearsed]
        return [(self.boxes, self.scores, self.labels % FOLDS == fold) for fold in (self.labels % FOLDS).unique()]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of what a network finds."""

    top: int
    overlap: float
    min_side: float
    min_score: float

    def keep(self, boxes: Tensor, scores: Tensor, base: Tensor) -> Tensor:
        """Rows to keep of an image's boxes, best first: those that overlap a base box go, then NMS.

        Args:
            boxes: (n, 4), scores: (n,), base: (b, 4); xyxy pixels of the original image.
        """
        rows = (self.usable(boxes, base) & (scores >= self.min_score)).nonzero().flatten()
        return rows[nms(boxes[rows], scores[rows], self.overlap)][: self.top]

    def usable(self, boxes: Tensor, base: Tensor) -> Tensor:
        """(n,) bool: which are large enough, and beside the base boxes."""
        sides = boxes[:, 2:] - boxes[:, :2]
        return torch.cat([sides >= self.min_side, box_iou(boxes, base) <= self.overlap], dim=1).all(dim=1)


USUAL = Selection(10, 0.5, LEAST_SIDE, 0.0)  # where base boxes say nothing


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and what base boxes say of it: recall R of held-out boxes, proposals an image B, and of these the
    share that lies on an object, at most n R / B.
    """

    selection: Selection
    recall: float
    per_image: float
    on_object: float

    def about(self) -> dict[str, float | int]:
        """JSON values."""
        numbers = {name: round(getattr(self, name), 4) for name in ("recall", "per_image", "on_object")}
        return asdict(self.selection) | {"by_base_boxes": numbers}

    @property
    def line(self) -> str:
        """In words."""
        one = self.selection
        return (
            f"chosen by base boxes alone: --overlap {one.overlap:g} --min-score {one.min_score:g} --min-side "
            f"{one.min_side:g} --top {one.top}. With base classes held out it finds {self.recall:.0%} of their "
            f"boxes at IoU {FOUND_IOU}; {self.per_image:.2f} proposals an image, of which about {self.on_object:.0%} "
            f"lie on an object and {1 - self.on_object:.0%} on none"
        )


def choose(examples: Iterable[Example], job: ProposeConfig) -> Choice | None:
    """The best choice of what the job leaves open; what it gives stays. None if no held-out box is found."""
    seen = list(examples)
    sides = torch.cat([torch.zeros(0), *((e.base[:, 2:] - e.base[:, :2]).amin(dim=1) for e in seen)])
    quantiles = [LEAST_SIDE]
    if len(sides):
        quantiles = torch.quantile(sides, torch.tensor(SIDE_QUANTILES)).floor().clamp(min=LEAST_SIDE).tolist()
    overlaps = OVERLAPS if job.overlap is None else (job.overlap,)
    min_sides = tuple(dict.fromkeys(quantiles)) if job.min_side is None else (job.min_side,)
    scores = SCORES if job.min_score is None else (job.min_score,)
    tops = TOPS if job.top is None else (job.top,)
    kept = np.zeros((len(overlaps), len(min_sides), len(scores), len(tops)))
    found = np.zeros_like(kept)
    for at, (overlap, min_side) in enumerate(product(overlaps, min_sides)):
        most = Selection(max(tops), overlap, min_side, min(scores))
        where = np.unravel_index(at, kept.shape[:2])
        for example in seen:
            kept[where] += _counts(example.scores[most.keep(*example[:3])].numpy(), scores, tops)
            for boxes, ranks, out in example.trials():
                rows = most.keep(boxes, ranks, example.base[~out])
                if not len(rows) or not out.any():
                    continue
                hit = box_iou(boxes[rows], example.base[out]) >= FOUND_IOU
                # A box is found by the first proposal that lies on it: by a choice that keeps this one.
                firsts = hit.int().argmax(dim=0)[hit.any(dim=0)].numpy()
                found[where] += _counts(ranks[rows].numpy(), scores, tops, firsts)
    if not found.any():
        return None
    recall = found / sum(int(out.sum()) for example in seen for *_, out in example.trials())
    per_image = kept / len(seen)
    objects = np.maximum(kept, 1) / len(seen) / np.maximum(recall, 1e-9)  # what keeps nothing says little of n
    count = objects[recall >= min(LEAST_RECALL, recall.max())].min()
    beta = RECALL_COUNTS**2
    score = (1 + beta) * count * recall / np.maximum(per_image + beta * count, 1e-9)
    best = np.unravel_index(score.argmax(), kept.shape)
    of_overlap, of_side, of_score, of_top = map(int, best)
    return Choice(
        Selection(tops[of_top], overlaps[of_overlap], min_sides[of_side], scores[of_score]),
        float(recall[best]),
        float(per_image[best]),
        float(min(1.0, count * recall[best] / max(per_image[best], 1e-9))),
    )


def _counts(
    ranked: np.ndarray, scores: tuple[float, ...], tops: tuple[int, ...], places: np.ndarray | None = None
) -> np.ndarray:
    """How many of the places, by default all, are among those that each lowest score and number keeps: (scores, tops).

    ranked: scores of an image's proposals, best first.
    """
    places = np.arange(len(ranked)) if places is None else places
    high = ranked[places][:, None, None] >= np.array(scores)[:, None]
    return np.asarray((high & (places[:, None, None] < np.array(tops))).sum(axis=0))
