"""COCO annotation files: read, checked, and cut to what a protocol may see.

`load_split` serves training, extraction and proposals (`base_only=True`: novel boxes never leave this file)
and evaluation. Boxes are xyxy, absolute pixels of the original image, clipped to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.errors import HdovdError, shorten
from hdovd.protocol import Protocol


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

    def path(self, image: ImageBoxes) -> Path:
        return self.folder / image.file_name


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file. Raises HdovdError naming it."""
    if not path.is_file():
        raise HdovdError(f"{what}: no file {path}")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HdovdError(f"{what} {path} is not valid JSON ({error}); is the download complete?") from error


def clip_box(xywh: Any, width: int, height: int) -> tuple[list[float] | None, str]:
    """A COCO box (x, y, w, h) as xyxy inside the image, or None with the reason why it cannot be one."""
    if not isinstance(xywh, list) or len(xywh) != 4 or not all(isinstance(v, int | float) for v in xywh):
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
    box = [float(np.float32(v)) for v in (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))]
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
    tree = read_json(annotations, "annotations")
    if not isinstance(tree, dict) or not {"images", "annotations", "categories"} <= tree.keys():
        raise HdovdError(f"{annotations} is no COCO instances file: it needs images, annotations and categories")
    if not folder.is_dir():
        raise HdovdError(f"no image folder {folder}: give it with --images")
    label_of, coco_ids = _labels(tree["categories"], protocol, annotations)
    images, skips = _images(tree["images"], annotations), Skips()
    boxes: dict[int, list[tuple[list[float], int, int]]] = {i: [] for i in images}
    seen: set[int] = set()
    for number, a in enumerate(tree["annotations"]):
        if not {"id", "image_id", "category_id", "bbox"} <= a.keys():
            raise HdovdError(f"{annotations}: annotation {a.get('id', f'number {number}')} lacks one of id, image_id, category_id, bbox")
        if a["id"] in seen:
            raise HdovdError(f"{annotations}: annotation id {a['id']} stands twice; the cache joins rows by it, so number them anew")
        seen.add(a["id"])
        image = images.get(a["image_id"])
        if image is None:
            raise HdovdError(f"{annotations}: annotation {a.get('id')} is for image {a['image_id']}, which is not in its "
                             "images; the file is damaged or was cut by hand")
        label = label_of.get(a["category_id"])
        if label is None or (base_only and (label >= len(protocol.base) or a.get("iscrowd", 0))):
            continue
        box, why = clip_box(a["bbox"], image["width"], image["height"])
        if box is None:
            skips.add(f"annotation, {why}", a["id"])
            continue
        boxes[a["image_id"]].append((box, label, a["id"]))
    kept = [_image_boxes(image, boxes[i]) for i, image in images.items()
            if boxes[i] and not (base_only and _too_small(image, protocol, skips))]
    if not kept:
        wanted = protocol.base if base_only else protocol.names
        raise HdovdError(f"{annotations} holds no usable box of the {len(wanted)} classes of protocol {protocol.name} "
                         f"({shorten(list(wanted))})" + "".join("\n" + line for line in skips.lines()))
    return Split(kept, folder, annotations, coco_ids, skips)


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
        if not {"id", "file_name", "width", "height"} <= entry.keys():
            raise HdovdError(f"{file}: image {entry.get('id')} lacks one of id, file_name, width, height")
        if entry["id"] in images:
            raise HdovdError(f"{file}: image id {entry['id']} stands twice")
        images[entry["id"]] = entry
    return images


def _image_boxes(image: dict[str, Any], rows: list[tuple[list[float], int, int]]) -> ImageBoxes:
    boxes, labels, ids = zip(*rows, strict=True)
    return ImageBoxes(image["id"], image["file_name"], image["width"], image["height"], np.array(boxes, np.float32),
                      np.array(labels, np.int64), np.array(ids, np.int64))


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Where a COCO-style data set lies. `images` and `annotations` override the COCO 2017 layout under `root`."""

    root: Path | None = None
    images: Path | None = None
    annotations: Path | None = None

    def load(self, split: str, protocol: Protocol, *, base_only: bool, log: Callable[[str], None] = print) -> Split:
        """`load_split` of `split` ("train2017", "val2017"); what is skipped goes to `log`."""
        if self.root is None and (self.images is None or self.annotations is None):
            raise HdovdError("give --data ROOT, or both --images and --annotations")
        root = self.root or Path()
        if self.root is not None and not root.is_dir():
            raise HdovdError(f"--data {root}: no such folder; expected a COCO folder with {split}/ and annotations/")
        loaded = load_split(self.annotations or root / "annotations" / f"instances_{split}.json", self.images or root / split,
                            protocol, base_only=base_only)
        for line in loaded.skips.lines():
            log(line)
        return loaded
