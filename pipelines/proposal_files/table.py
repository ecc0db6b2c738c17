"""Proposals in memory: of one image, and all of a file as columns, with the identity that follows from them; and each
form of their files, read into columns. Written by `file`. M rows, one a proposal, in the file's order.

- COCO results JSON: `[{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]`.
- .npz, hdovd's own: image_id (N,) int64, offset (N+1,) int64, box (M, 4) float32 xyxy, score (M,) float32, metadata:
  JSON text; the rows of image i are offset[i]:offset[i+1]. Readable by numpy alone.
- .pkl, mmdetection's: a list of (n, 4 or 5) arrays xyxy (and score), one an image, in the order of the annotation
  file's `images` (mmdetection 2 and HD-OVD's loader read it so), or by ascending image id (OADP's `proposal_sorted`).
- .pkl, Detectron2's: a dict with `ids`, `boxes`, `objectness_logits` (older: `indexes`, `scores`), and `bbox_mode` 0
  (xyxy, the default) or 1 (xywh); also that of LVIS and the Detectron2-based projects.

Pickles are read by `safe_pickle`. mmdetection 3 pickles objects of its own classes by file name, which that refuses.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.identity import hash_tables
from hdovd.core.errors import HdovdError, Unfit
from hdovd.core.text_files import JsonStream, cut, shown
from hdovd.data.coco import ImageBoxes, Skips, number, whole
from hdovd.pipelines.common.options import ListOrder
from hdovd.pipelines.proposal_files.safe_pickle import load_arrays

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
    found = {}
    for at in np.argsort(np.minimum.reduceat(order, starts)).tolist():
        rows = slice(starts[at], stops[at])
        found[sorted_id.item(rows.start)] = Proposals(box[rows], score[rows])
    return found


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


NPZ_FORMAT, NPZ_VERSION = "hdovd proposals", 1
_NPZ = {"image_id": np.int64, "offset": np.int64, "box": np.float32, "score": np.float32}
_RENAMED = {"indexes": "ids", "scores": "objectness_logits"}
_MOST_OUTSIDE = 0.01  # of the boxes: mmdetection cuts proposals to the image, so in the right order none reach out


def read_coco_results(path: Path) -> ProposalTable:
    """COCO results JSON, entry by entry. Raises HdovdError if it is not of that form."""
    form = "proposal file: expected COCO results JSON, a list of {image_id, bbox: [x, y, w, h], score}"
    # Flat arrays: 4 million proposals take gigabytes as lists. Scores in double precision, as they sort.
    ids, boxes, scores = array("q"), array("f"), array("d")
    for entry in JsonStream(path, "proposals").items(form):
        if not isinstance(entry, dict) or not {"image_id", "bbox", "score"} <= entry.keys():
            raise HdovdError(f"{path} is no {form}")
        ids.append(whole(entry["image_id"], f"{path}: entry {len(ids)}: image_id"))
        boxes.extend(_xyxy(entry["bbox"]))
        scores.append(number(entry["score"]))
    return ProposalTable(
        np.frombuffer(ids, np.int64),
        np.frombuffer(boxes, np.float32).reshape(-1, 4),
        np.frombuffer(scores, np.float64),
        "COCO results JSON",
    )


def _xyxy(xywh: Any) -> tuple[float, float, float, float]:
    if not isinstance(xywh, list) or len(xywh) != 4:
        return (float("nan"),) * 4
    x, y, w, h = map(number, xywh)
    return x, y, x + w, y + h


def read_npz(path: Path) -> tuple[ProposalTable, dict[str, Any]]:
    """The columns and the metadata of hdovd's own form. Raises HdovdError if it is damaged, or another .npz."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if absent := sorted({*_NPZ, "metadata"} - set(file.files)):
                raise HdovdError(
                    f"{path} is no proposal file of hdovd's: it lacks {', '.join(absent)}; it holds "
                    + cut(", ".join(file.files))
                )
            metadata = json.loads(str(file["metadata"]))
            columns = {name: file[name] for name in _NPZ}
        if metadata["format"] != NPZ_FORMAT or metadata["version"] != NPZ_VERSION:
            raise HdovdError(
                f"{path} is of {shown(metadata['format'])}, version {shown(metadata['version'])}; this hdovd reads "
                f"{NPZ_FORMAT}, version {NPZ_VERSION}: is it of a newer hdovd?"
            )
    except HdovdError:
        raise
    except Exception as error:  # a damaged archive fails in every way that zipfile, its decompressors and numpy have
        raise HdovdError(
            f"{path} is damaged ({type(error).__name__}: {cut(str(error))}); expected the .npz of hdovd propose or "
            f"hdovd proposals convert: is the download complete?"
        ) from error
    image_id, offset, box, score = columns.values()
    shapes = (image_id.shape, offset.shape, box.shape, score.shape)
    if (
        any(columns[name].dtype != kind for name, kind in _NPZ.items())
        or image_id.ndim != 1
        or offset.shape != (len(image_id) + 1,)
        or score.ndim != 1
        or box.shape != (len(score), 4)
        or offset[0] != 0
        or offset[-1] != len(score)
        or (np.diff(offset) < 0).any()
        or len(np.unique(image_id)) < len(image_id)
    ):
        raise HdovdError(
            f"{path}: image_id, offset, box and score do not fit together (shapes {shapes}): make the file anew"
        )
    return ProposalTable(np.repeat(image_id, np.diff(offset)), box, score, "hdovd's .npz"), metadata


def read_pickle(path: Path, annotations: Path | None, order: ListOrder) -> ProposalTable:
    """The pickles of mmdetection and Detectron2. `annotations` and `order`: what tells the images of a list.

    Raises HdovdError if it is unsafe, damaged or of another form, or for a list that does not fit the annotation file.
    """
    content = load_arrays(path)
    if isinstance(content, dict):
        return _of_dict({_RENAMED.get(name, name): value for name, value in content.items()}, path)
    if not isinstance(content, list):
        raise HdovdError(
            f"{path} is no proposal file: expected a list of arrays or a dict with ids and boxes, found a "
            + type(content).__name__
        )
    if annotations is None:
        raise HdovdError(
            f"{path} is a list of {len(content)} arrays that go with images by their place alone: give the annotation "
            f"file that they were made for with --annotations"
        )
    return _of_list(content, path, annotations, order)


def _of_list(content: list[Any], path: Path, annotations: Path, order: ListOrder) -> ProposalTable:
    ids, sizes = _images(annotations)
    if len(content) != len(ids):
        raise HdovdError(
            f"{path} holds proposals for {len(content)} images, {annotations} lists {len(ids)}, and they go together "
            f"by place in the list: give the annotation file that the proposals were made for"
        )
    parts = [_boxes(entry, f"{path}: entry {place}") for place, entry in enumerate(content)]
    counts = np.array([len(boxes) for boxes, _ in parts], np.int64)
    box, score = (
        (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else (np.zeros((0, 4)), np.zeros(0))
    )
    box, score = box.astype(np.float32), score.astype(np.float32)
    images = {ListOrder.FILE: np.arange(len(ids)), ListOrder.ID: np.argsort(ids)}
    outside = {each: _outside(box, sizes[np.repeat(images[each], counts)]) for each in ListOrder}
    notes: tuple[str, ...] = (
        f"{path.name} is a list without image ids: it was taken to go with the images of {annotations} "
        f"{order.words} (--order {order})",
    )
    if outside[order] > _MOST_OUTSIDE * len(box):
        other = next(each for each in ListOrder if each is not order)
        found = f"{outside[order]:,d} of {len(box):,d} boxes reach out of their image"
        if outside[other] * 10 < outside[order]:
            raise HdovdError(
                f"{path} does not fit {annotations} {order.words}: {found}, {other.words} {outside[other]:,d} do. "
                f"Convert it: hdovd proposals convert {path} --annotations {annotations} --order {other} --out NEW.npz"
            )
        notes += (f"{found}: is that the annotation file that they were made for?",)
    return ProposalTable(
        np.repeat(ids[images[order]], counts), box, score, f"a pickled list, {order.words}", None, notes
    )


def _outside(box: np.ndarray, size: np.ndarray) -> int:
    """How many boxes (M, 4) end more than a pixel outside their image."""
    return int(((box[:, 2:] > size + 1).any(1) | (box[:, :2] < -1).any(1)).sum())


def _images(annotations: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) and sizes (N, 2) of an annotation file's images, in its order; reads no further than it must."""
    rows: list[list[int]] = []
    for key, item in JsonStream(annotations, "annotations"):
        if key == "images":
            where = f"{annotations}: image number {len(rows)}"
            if not isinstance(item, dict):
                raise HdovdError(f"{where} is {shown(item)}, expected an image")
            rows.append([whole(item.get(name), f"{where}: {name}") for name in ("id", "width", "height")])
        elif rows:
            break
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1:].astype(np.float32)


def _of_dict(content: dict[Any, Any], path: Path) -> ProposalTable:
    """Detectron2's: every value but `bbox_mode` has an entry an image."""
    needed = ("ids", "boxes", "objectness_logits")
    if not set(needed) <= content.keys():
        raise HdovdError(
            f"{path} is no proposal file: expected a dict with {', '.join(needed)}, found one with "
            + ", ".join(map(shown, list(content)[:6]))
        )
    ids, boxes, scores = (content[name] for name in needed)
    mode = _plain(content.get("bbox_mode", 0))
    if type(mode) is not int or mode not in (0, 1):
        raise HdovdError(f"{path}: bbox_mode is {shown(mode)}: expected 0 (xyxy) or 1 (xywh), in pixels")
    try:
        numbers = [
            whole(int(i) if isinstance(i, str) and i.isdecimal() else _plain(i), f"{path}: one of ids") for i in ids
        ]
        if not len(numbers) == len(boxes) == len(scores) or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{len(numbers)} ids ({len(set(numbers))} different), {len(boxes)} boxes, {len(scores)} scores"
            )
    except (ValueError, TypeError) as error:
        raise HdovdError(
            f"{path}: ids, boxes and objectness_logits need one entry an image, and whole numbers as ids: {error}"
        ) from error
    parts = [_boxes(own, f"{path}: image {i}")[0] for i, own in zip(numbers, boxes, strict=True)]
    logits = [
        _scores(own, f"{path}: image {i}", len(part)) for i, own, part in zip(numbers, scores, parts, strict=True)
    ]
    box = np.concatenate([np.zeros((0, 4), np.float32), *parts])
    if mode == 1:
        box[:, 2:] += box[:, :2]
    return ProposalTable(
        np.repeat(np.array(numbers, np.int64), [len(own) for own in parts]),
        box,
        np.concatenate([np.zeros(0, np.float32), *logits]),
        "a pickled dict of Detectron2's form",
    )


def _plain(value: Any) -> Any:
    """The Python number of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def _scores(value: Any, what: str, count: int) -> np.ndarray:
    """(count,) float32 of an array or a list of numbers."""
    try:
        values = np.asarray(value).reshape(-1)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in "iuf":
        raise HdovdError(f"{what}: objectness_logits are {shown(value)} of something else than numbers")
    if len(values) != count:
        raise HdovdError(f"{what} has {count} boxes and {len(values)} objectness_logits")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _boxes(value: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores as `boxes_of`; a detector of one class has a list of one array."""
    return boxes_of(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value, what)
