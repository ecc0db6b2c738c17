"""Proposals in memory: of one image, and all of a file as columns, with the identity that follows from them.

Read and written by `file`; the forms of files are in `formats`. M rows, one a proposal, in the file's
order.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hdovd.cache.identity import hash_tables
from hdovd.core.errors import Unfit
from hdovd.data.coco import ImageBoxes, Skips

MadeBy = dict[str, Any]  # JSON values: what made proposals
_REASONS = (
    "box is not four numbers",
    "box is not finite",
    "box is inverted (negative width or height)",
    "box has no area",
    "box lies outside the image",
    "score is not a finite number",
)
ROWS = 65_536  # looked at together


@dataclass(frozen=True, slots=True)
class Proposals:
    """The proposals of one image, best first: boxes (n, 4) float32 xyxy pixels, scores (n,) float32."""

    boxes: np.ndarray
    scores: np.ndarray


NO_PROPOSALS = Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class ProposalTable:
    """image_id (M,) int64, box (M, 4) float32 xyxy pixels as the file has them, score (M,) float32, or float64 where
    the file's decimals order what float32 makes equal; NaN where there is no number.

    `made_by`: what made them, None if that is not known. `form`: the file's, in words. `notes`: what a reader of it
    should be told.
    """

    image_id: np.ndarray
    box: np.ndarray
    score: np.ndarray
    form: str = ""
    made_by: MadeBy | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, proposals: dict[int, Proposals]) -> "ProposalTable":
        """All of `proposals`, image by image."""
        found = [NO_PROPOSALS, *proposals.values()]
        return cls(
            np.repeat(np.array(list(proposals), np.int64), [len(p.boxes) for p in found[1:]]),
            np.concatenate([p.boxes for p in found]),
            np.concatenate([p.scores for p in found]),
        )

    def identity(self) -> str:
        """A hash of boxes and scores (float32) by image id: the same for every form of file and every order of its
        entries.
        """
        box, score = self.box + np.float32(0), self.score.astype(np.float32) + np.float32(0)  # no -0
        box[np.isnan(box)], score[np.isnan(score)] = np.nan, np.nan  # one kind of NaN
        order = np.lexsort((*box.T, -score, self.image_id))
        return hash_tables([self.image_id[order], box[order], score[order]])

    def by_image(self) -> dict[int, Proposals]:
        """All rows, best first; equal scores in the file's order."""
        return _grouped(self.image_id, self.box, self.score, self._order(np.ones(len(self.image_id), bool)))

    def for_images(self, images: Sequence[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
        """The usable ones of `images` by image id, cut to their image; what is left out goes to `skips`."""
        if not images:
            return {}
        ids = np.array([image.id for image in images], np.int64)
        sizes = np.array([(image.width, image.height) for image in images], np.float32)
        by_id = np.argsort(ids)
        ids, sizes = ids[by_id], sizes[by_id]
        keep, unknown = np.zeros(len(self.image_id), bool), Counter[int]()
        for start in range(0, len(keep), ROWS):
            rows = slice(start, start + ROWS)
            place = np.searchsorted(ids, self.image_id[rows]).clip(max=len(ids) - 1)
            known = ids[place] == self.image_id[rows]
            others, counts = np.unique(self.image_id[rows][~known], return_counts=True)
            unknown.update(dict(zip(others.tolist(), counts.tolist(), strict=True)))
            reason = _reason(self.box[rows], sizes[place], self.score[rows])
            for row in np.flatnonzero(known & (reason >= 0)).tolist():
                skips.add(f"proposal, {_REASONS[reason[row]]}, entry", start + row)
            keep[rows] = known & (reason < 0)
        for image_id in sorted(unknown):  # an image once: a set's record is read by every run
            skips.add(
                f"image with proposals that is not in the training set ({unknown.total():,d} proposals)", image_id
            )
        found = _grouped(self.image_id, self.box, self.score, self._order(keep))
        for image_id, own in found.items():
            own.boxes.clip(0, np.tile(sizes[np.searchsorted(ids, image_id)], 2), out=own.boxes)
        return found

    def _order(self, keep: np.ndarray) -> np.ndarray:
        """The rows to keep (M,), image by image, best first; equal scores in the file's order."""
        order = np.lexsort((-self.score, self.image_id))
        return order if keep.all() else order[keep[order]]


def boxes_of(value: Any, what: str, columns: tuple[int, ...] = (4, 5)) -> tuple[np.ndarray, np.ndarray]:
    """An array (n, 4 or 5) that a stranger's file holds as boxes (n, 4) and scores (n,), 1 without any; float32.

    Raises Unfit, naming it as `what`, for anything else.
    """
    if isinstance(value, np.ndarray) and value.size == 0:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind not in "iuf"
        or value.ndim != 2
        or value.shape[1] not in columns
    ):
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        expected = " or ".join(f"(n, {count})" for count in columns)
        raise Unfit(f"{what} is no array of boxes: expected {expected} numbers, found {found}")
    with np.errstate(over="ignore"):
        rows = value.astype(np.float32)
    return rows[:, :4], rows[:, 4] if rows.shape[1] == 5 else np.ones(len(rows), np.float32)


def _grouped(image_id: np.ndarray, box: np.ndarray, score: np.ndarray, order: np.ndarray) -> dict[int, Proposals]:
    """The rows `order` by image, in the order in which the images are met in the file. Copies."""
    box, score, sorted_id = box[order], score[order].astype(np.float32), image_id[order]
    starts = np.flatnonzero(np.diff(sorted_id, prepend=sorted_id[:1] - 1))
    stops = np.append(starts[1:], len(order))
    if not len(order):
        return {}
    met = np.argsort(np.minimum.reduceat(order, starts))
    images = zip(starts[met].tolist(), stops[met].tolist(), strict=True)
    return {sorted_id.item(start): Proposals(box[start:stop], score[start:stop]) for start, stop in images}


def _reason(box: np.ndarray, edge: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For each row the number of the reason why it cannot be used in an image of size `edge` (n, 2), or -1.

    The rules of `coco.clip_box`, on columns.
    """
    low, high = box[:, :2], box[:, 2:]
    with np.errstate(invalid="ignore"):
        tests = [
            np.isnan(box).all(1),
            ~np.isfinite(box).all(1),
            (high < low).any(1),
            (high == low).any(1),
            (low >= edge).any(1) | (high <= 0).any(1),
            ~np.isfinite(score),
        ]
    return np.select(tests, range(len(_REASONS)), -1)
