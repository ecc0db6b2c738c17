"""COCO annotation files: read, checked, and cut to what a protocol may see.

`load_split` serves training, extraction and proposals (`base_only=True`: novel boxes never leave this file)
and evaluation. Boxes are xyxy, absolute pixels of the original image, clipped to it.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.errors import HdovdError, shorten
from hdovd.json_stream import JsonStream
from hdovd.protocol import Protocol

if TYPE_CHECKING:
    import numpy as np

_PARTS = {"images", "annotations", "categories"}
_IMAGE_KEYS = ("id", "file_name", "width", "height")


class Exif(StrEnum):
    """Whether pictures whose annotated size fits both turned as their EXIF orientation says and as stored are turned."""

    APPLY = "apply"
    IGNORE = "ignore"


@dataclass(slots=True)
class Skips:
    """What was left out, by reason; every entry is an id. Printed as counts with the first ids; caches and runs keep all."""

    by_reason: dict[str, list[int | str]] = field(default_factory=dict)

    def add(self, reason: str, item: int | str) -> None:
        self.by_reason.setdefault(reason, []).append(item)

    def lines(self) -> list[str]:
        return [f"skipped {len(ids)}: {reason} ({shorten(list(ids))})" for reason, ids in sorted(self.by_reason.items())]


@dataclass(frozen=True, slots=True)
class ImageBoxes:
    """One image and its boxes: boxes (n, 4) float32, labels (n,) int64, annotation_ids (n,) int64."""

    id: int
    file_name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Split:
    """The images of one annotation file that a protocol keeps, in file order.

    `coco_ids`: the category id of every class, in label order.
    """

    images: list[ImageBoxes]
    folder: Path
    annotations: Path
    coco_ids: tuple[int, ...]
    skips: Skips
    exif: Exif = Exif.APPLY

    def path(self, image: ImageBoxes) -> Path:
        return self.folder / image.file_name


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file whole (`JsonStream` is for the large ones). Raises HdovdError naming it."""
    if not path.is_file():
        raise HdovdError(f"{what}: no file {path}")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HdovdError(f"{what} {path} is not valid JSON ({error}); is the download complete?") from error


def _four_numbers(xywh: Any) -> bool:
    return isinstance(xywh, list) and len(xywh) == 4 and all(isinstance(v, int | float) for v in xywh)


def clip_box(xywh: Any, width: int, height: int) -> tuple[list[float] | None, str]:
    """A COCO box (x, y, w, h) as xyxy inside the image, or None with the reason why it cannot be one."""
    if not _four_numbers(xywh):
        return None, "box is not four numbers"
    x, y, w, h = map(float, xywh)
    if not all(map(math.isfinite, (x, y, w, h))):
        return None, "box is not finite"
    if w < 0 or h < 0:
        return None, "box is inverted (negative width or height)"
    if w * h == 0:
        return None, "box has no area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return None, "box lies outside the image"
    box = array("f", (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))).tolist()  # as float32 holds it
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, "box has no area"
    return box, ""


def load_split(annotations: Path, folder: Path, protocol: Protocol, *, base_only: bool) -> Split:
    """Read an `instances_*.json`.

    With `base_only` (training): base boxes alone, crowd boxes left out, images without a base box or with a
    side under the protocol's minimum left out. Otherwise (evaluation): images with at least one annotation
    of the protocol's classes, with the boxes of all classes.

    Raises HdovdError if the file is not COCO's, lacks a class of the protocol, names an unknown image, or
    if nothing is left.
    """
    import numpy as np  # here: the command line names DataPaths before it needs arrays

    entries, categories, columns = _read(annotations)
    if not folder.is_dir():
        raise HdovdError(f"no image folder {folder}: give it with --images")
    label_of, coco_ids = _labels(categories, protocol, annotations)
    images, skips = _images(entries, annotations), Skips()
    rows = {i: array("q") for i in images}  # of the columns, image by image
    labels = np.zeros(len(columns.ids), np.int64)
    seen: set[int] = set()
    for row, (number, image_id, category) in enumerate(zip(columns.ids, columns.image_ids, columns.categories, strict=True)):
        if number in seen:
            raise HdovdError(f"{annotations}: annotation id {number} stands twice; the cache joins rows by it, so number them anew")
        seen.add(number)
        image = images.get(image_id)
        if image is None:
            raise HdovdError(f"{annotations}: annotation {number} is for image {image_id}, which is not in its "
                             "images; the file is damaged or was cut by hand")
        label = label_of.get(category)
        if label is None or (base_only and (label >= len(protocol.base) or columns.crowd[row])):
            continue
        box, why = clip_box(None if row in columns.odd else columns.boxes[4 * row:4 * row + 4].tolist(), image["width"], image["height"])
        if box is None:
            skips.add(f"annotation, {why}", number)
            continue
        columns.boxes[4 * row:4 * row + 4] = array("d", box)
        labels[row] = label
        rows[image_id].append(row)
    if columns.fault:
        raise HdovdError(columns.fault)
    boxes = np.frombuffer(columns.boxes).reshape(-1, 4)
    kept = [ImageBoxes(i, image["file_name"], image["width"], image["height"], boxes[rows[i]].astype(np.float32), labels[rows[i]],
                       np.array([columns.ids[row] for row in rows[i]], np.int64))
            for i, image in images.items() if rows[i] and not (base_only and _too_small(image, protocol, skips))]
    if not kept:
        wanted = protocol.base if base_only else protocol.names
        raise HdovdError(f"{annotations} holds no usable box of the {len(wanted)} classes of protocol {protocol.name} "
                         f"({shorten(list(wanted))})" + "".join("\n" + line for line in skips.lines()))
    return Split(kept, folder, annotations, coco_ids, skips)


@dataclass(slots=True)
class _Columns:
    """Annotations in file order, up to the first that lacks a key (`fault` says so). As dicts, with outlines, they take gigabytes."""

    ids: list[Any] = field(default_factory=list)
    image_ids: list[Any] = field(default_factory=list)
    categories: list[Any] = field(default_factory=list)
    crowd: bytearray = field(default_factory=bytearray)
    boxes: array[float] = field(default_factory=lambda: array("d"))  # four each
    odd: set[int] = field(default_factory=set)  # rows whose box is not four numbers
    fault: str = ""

    def add(self, a: dict[str, Any], file: Path) -> None:
        if self.fault:
            return
        if not {"id", "image_id", "category_id", "bbox"} <= a.keys():
            self.fault = f"{file}: annotation {a.get('id', f'number {len(self.ids)}')} lacks one of id, image_id, category_id, bbox"
            return
        box = a["bbox"]
        if not _four_numbers(box):
            self.odd.add(len(self.ids))
            box = (0, 0, 0, 0)
        self.boxes.extend(box)
        self.ids.append(a["id"])
        self.image_ids.append(a["image_id"])
        self.categories.append(a["category_id"])
        self.crowd.append(bool(a.get("iscrowd", 0)))


def _read(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], _Columns]:
    """The images (their needed keys), categories and annotations of an instances file; the keys of the file come in any order."""
    images: list[dict[str, Any]] = []
    categories: list[dict[str, Any]] = []
    columns, stream = _Columns(), JsonStream(file, "annotations")
    strange = False  # said at the end, where the file is known to be JSON
    for key, item in stream:
        if key not in _PARTS:
            continue
        if key not in stream.lists or not isinstance(item, dict):
            strange = True
        elif key == "annotations":
            columns.add(item, file)
        elif key == "images":
            images.append({k: item[k] for k in _IMAGE_KEYS if k in item})
        else:
            categories.append(item)
    if strange or not stream.lists >= _PARTS:
        raise HdovdError(f"{file} is no COCO instances file: it needs images, annotations and categories")
    return images, categories, columns


def _too_small(image: dict[str, Any], protocol: Protocol, skips: Skips) -> bool:
    small = min(image["width"], image["height"]) < protocol.min_image_side_px
    if small:
        skips.add(f"image with a side under {protocol.min_image_side_px} px", image["id"])
    return bool(small)


def _labels(categories: list[dict[str, Any]], protocol: Protocol, file: Path) -> tuple[dict[int, int], tuple[int, ...]]:
    if not all({"id", "name"} <= c.keys() for c in categories):
        raise HdovdError(f"{file}: a category lacks id or name")
    id_of = {c["name"]: c["id"] for c in categories}
    if len(id_of) < len(categories):
        twice = sorted({c["name"] for c in categories if [d["name"] for d in categories].count(c["name"]) > 1})
        raise HdovdError(f"{file}: categories of the same name: {shorten(list(twice))}; rename or merge them")
    absent = [name for name in protocol.names if name not in id_of]
    if absent:
        near = {name: get_close_matches(name, id_of, 1) for name in absent}
        hints = "; ".join(f"{name!r}" + (f" (the file has {n[0]!r})" if n else "") for name, n in list(near.items())[:8])
        raise HdovdError(f"protocol {protocol.name} names classes that {file} does not know: {hints}. "
                         "Give the split that fits this data with --protocol")
    coco_ids = tuple(id_of[name] for name in protocol.names)
    return {coco_id: label for label, coco_id in enumerate(coco_ids)}, coco_ids


def _images(entries: list[dict[str, Any]], file: Path) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if len(entry) < len(_IMAGE_KEYS):
            raise HdovdError(f"{file}: image {entry.get('id')} lacks one of id, file_name, width, height")
        if entry["id"] in images:
            raise HdovdError(f"{file}: image id {entry['id']} stands twice")
        images[entry["id"]] = entry
    return images


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Where a COCO-style data set lies. `images` and `annotations` override the COCO 2017 layout under `root`."""

    root: Path | None = None
    images: Path | None = None
    annotations: Path | None = None

    def load(self, split: str, protocol: Protocol, *, base_only: bool, log: Callable[[str], None] = print,
             exif: Exif = Exif.APPLY) -> Split:
        """`load_split` of `split` ("train2017", "val2017"), its pictures to be read by `exif`; what is skipped goes to `log`."""
        loaded = replace(load_split(*self.locate(split), protocol, base_only=base_only), exif=exif)
        for line in loaded.skips.lines():
            log(line)
        return loaded

    def locate(self, split: str) -> tuple[Path, Path]:
        """The annotation file and the image folder of a split. Raises HdovdError if they are not there."""
        annotations, folder = self.annotation_file(split), self.images or (self.root or Path()) / split
        if not folder.is_dir():
            raise HdovdError(f"no image folder {folder}: give it with --images")
        return annotations, folder

    def annotation_file(self, split: str) -> Path:
        """Raises HdovdError if it is not there."""
        if self.root is None and (self.images is None or self.annotations is None):
            raise HdovdError("give --data ROOT, or both --images and --annotations")
        root = self.root or Path()
        if self.root is not None and not root.is_dir():
            raise HdovdError(f"--data {root}: no such folder; expected a COCO folder with {split}/ and annotations/")
        annotations = self.annotations or root / "annotations" / f"instances_{split}.json"
        if not annotations.is_file():
            raise HdovdError(f"annotations: no file {annotations}")
        return annotations
