"""The forms of proposal files, each read into columns.

COCO results JSON      `[{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]`
.npz, hdovd's own image_id (N,) int64, offset (N+1,) int64, box (M, 4) float32 xyxy, score (M,) float32, metadata: JSON
text;
                       the rows of image i are offset[i]:offset[i+1]; readable by numpy alone
.pkl, mmdetection's a list of (n, 4 or 5) arrays xyxy (and score), one an image, in the order of the annotation file's
`images`
                       (mmdetection 2 and HD-OVD's loader read it so), or by ascending image id (OADP's
                       `proposal_sorted` files)
.pkl, Detectron2's a dict with `ids`, `boxes`, `objectness_logits` (older: `indexes`, `scores`), and `bbox_mode` 0
(xyxy,
                       the default) or 1 (xywh); also that of LVIS and the Detectron2-based projects

Pickles are read by `safe_pickle`. mmdetection 3 pickles objects of its own classes by file name, which that refuses.
"""

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError
from hdovd.core.text_files import JsonStream, cut, shown
from hdovd.data.coco import whole
from hdovd.pipelines.proposal_files.options import ListOrder
from hdovd.pipelines.proposal_files.safe_pickle import load_arrays
from hdovd.pipelines.proposal_files.table import ProposalTable, boxes_of

NPZ_FORMAT, NPZ_VERSION = "hdovd proposals", 1
_NPZ = {"image_id": np.int64, "offset": np.int64, "box": np.float32, "score": np.float32}
_RENAMED = {"indexes": "ids", "scores": "objectness_logits"}
_MOST_OUTSIDE = 0.01  # of the boxes: mmdetection cuts proposals to the image, so in the right order none reach out


def read_coco_results(path: Path) -> ProposalTable:
    """COCO results JSON, entry by entry. Raises HdovdError if it is not of that form."""
    strange = (
        f"{path} is no proposal file: expected COCO results JSON, a list of {{image_id, bbox: [x, y, w, h], score}}"
    )
    # Flat arrays: 4 million proposals take gigabytes as lists. Scores in double precision, as they sort.
    ids, boxes, scores = array("q"), array("f"), array("d")
    stream = JsonStream(path, "proposals")
    for _, entry in stream:
        if None not in stream.lists or not isinstance(entry, dict) or not {"image_id", "bbox", "score"} <= entry.keys():
            raise HdovdError(strange)
        ids.append(whole(entry["image_id"], f"{path}: entry {len(ids)}: image_id"))
        boxes.extend(_xyxy(entry["bbox"]))
        scores.append(_number(entry["score"]))
    if None not in stream.lists:
        raise HdovdError(strange)
    return ProposalTable(
        np.frombuffer(ids, np.int64),
        np.frombuffer(boxes, np.float32).reshape(-1, 4),
        np.frombuffer(scores, np.float64),
        "COCO results JSON",
    )


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else float("nan")
    except OverflowError:  # a whole number past the largest float
        return float("inf")


def _xyxy(xywh: Any) -> tuple[float, float, float, float]:
    if not isinstance(xywh, list) or len(xywh) != 4:
        return (float("nan"),) * 4
    x, y, w, h = map(_number, xywh)
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
