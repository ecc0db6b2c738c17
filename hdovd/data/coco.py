"""COCO annotation files: read, checked, and cut to what a protocol may see.

`load_split` serves training, extraction and proposals (`base_only=True`: novel boxes never leave this file)
and evaluation. Boxes are xyxy, absolute pixels of the original image, clipped to it.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hdovd.core import HdovdError, counted, log, shorten
from hdovd.core.text_files import LONGEST_PATH, JsonStream, checked_name, shown
from hdovd.data.forms.base import AUTO, COCO, Form, find_form
from hdovd.data.protocol import Protocol

if TYPE_CHECKING:
    import numpy as np

_PARTS = {"images", "annotations", "categories"}
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")  # of LVIS
_IMAGE_KEYS = ("id", "file_name", "coco_url", "width", "height", *_FEDERATED)
_MOST = (1 << 63) - 1  # of ids: caches hold them in 64 bits
_LONGEST_SIDE = (1 << 31) - 1
_IN_WORDS = ("not LVIS's (its images have no neg_category_ids)", "LVIS's (its images have neg_category_ids)")


class Exif(StrEnum):
    """Whether pictures whose annotated size fits both turned as their EXIF orientation says and as stored are
    turned."""

    APPLY = "apply"
    IGNORE = "ignore"


@dataclass(slots=True)
class Skips:
    """What was left out, by reason; every entry is an id. Printed as counts with the first ids; caches and runs keep
    all.
    """

    by_reason: dict[str, list[int | str]] = field(default_factory=dict)

    def add(self, reason: str, item: int | str) -> None:
        self.by_reason.setdefault(reason, []).append(item)

    def lines(self) -> list[str]:
        return [
            f"skipped {len(ids)}: {reason} ({shorten(list(ids))})" for reason, ids in sorted(self.by_reason.items())
        ]


@dataclass(frozen=True, slots=True)
class ImageBoxes:
    """One image and its boxes: boxes (n, 4) float32, labels (n,) int64, annotation_ids (n,) int64. `judged` (K,) bool:
    of a federated protocol, the classes all of whose objects in it have a box, or that are known not to be in it; None:
    all are.
    """

    id: int
    file_name: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray
    judged: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The images of one annotation file that a protocol keeps, in file order.

    `coco_ids`: the category id of every class, in label order. `empty`: ids of images that were left out since they
    hold no object.
    """

    images: list[ImageBoxes]
    folder: Path
    annotations: Path
    coco_ids: tuple[int, ...]
    skips: Skips
    exif: Exif = Exif.APPLY
    empty: list[int] = field(default_factory=list)

    def path(self, image: ImageBoxes) -> Path:
        return self.folder / image.file_name


def number(value: Any) -> float:
    """A number of a file; NaN for what is none, a bool too, and infinite for a whole number past the largest float."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.inf


def four_numbers(xywh: Any) -> list[float]:
    """The numbers of a COCO box, all NaN if it holds anything else."""
    sound = isinstance(xywh, list) and len(xywh) == 4 and all(type(v) in (int, float) for v in xywh)
    return [*map(number, xywh)] if sound else [math.nan] * 4


def clip_box(xywh: Any, width: int, height: int) -> tuple[list[float] | None, str]:
    """A COCO box (x, y, w, h) as xyxy inside the image, or None with the reason why it cannot be one."""
    x, y, w, h = numbers = four_numbers(xywh)
    box = array(
        "f", (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    ).tolist()  # as float32 holds it
    faults = (
        ("box is not four numbers", all(map(math.isnan, numbers))),
        ("box is not finite", not all(map(math.isfinite, numbers))),
        ("box is inverted (negative width or height)", w < 0 or h < 0),
        ("box has no area", w * h == 0),
        ("box lies outside the image", x >= width or y >= height or x + w <= 0 or y + h <= 0),
        ("box has no area", box[2] <= box[0] or box[3] <= box[1]),
    )
    why = next((fault for fault, there in faults if there), "")
    return (None if why else box), why


def load_split(
    annotations: Path, folder: Path, protocol: Protocol, *, base_only: bool, federated: bool | None = None
) -> Split:
    """Read an `instances_*.json`. `federated`: as for `read_instances`.

    With `base_only` (training): base boxes alone, crowd boxes left out, images without a base box or with a
    side under the protocol's minimum left out. Otherwise (evaluation): images with at least one annotation
    of the protocol's classes, with the boxes of all classes. The protocol may keep the images without any
    (`keep_empty`).

    Raises HdovdError if the file is not COCO's, holds a value of another type than its key has, lacks a class of the
    protocol, names an unknown image, or if nothing is left.
    """
    import numpy as np  # here: the command line names DataPaths before it needs arrays

    if not folder.is_dir():
        raise HdovdError(f"no image folder {folder}: give it with --images")
    found = read_instances(annotations, folder, federated)
    coco_ids = coco_ids_of(found.names, protocol, annotations)
    label_of = {coco_id: label for label, coco_id in enumerate(coco_ids)}
    if found.absent and not protocol.federated:
        log(
            f"note: {annotations} says what is not in its images, as LVIS's annotations do, but protocol "
            f"{protocol.name} takes them for complete: federated = true in it would not"
        )
    others = Counter(found.names[c] for c in found.categories.tolist() if c not in label_of and c in found.names)
    if others and federated is None:  # COCO's and LVIS's own have more classes than a protocol
        log(
            f"note: {annotations}: {counted(others.total(), 'box is', 'boxes are')} of classes that protocol "
            f"{protocol.name} does not name: {shorten(sorted(others))}"
        )
    skips, wanted = Skips(), protocol.base if base_only else protocol.names
    asked = coco_ids[: len(wanted)]
    rows, spoilt = _usable(found, set(asked), base_only, skips)
    if not any(rows.values()):
        raise HdovdError(
            f"{annotations} holds no usable box of the {len(wanted)} classes of protocol {protocol.name} "
            f"({shorten(list(wanted))})" + "".join("\n" + line for line in skips.lines())
        )
    keep_empty = protocol.keep_empty_train if base_only else protocol.keep_empty_val
    kept, empty = list[ImageBoxes](), list[int]()
    for i, (name, width, height) in found.images.items():
        own = np.array(rows[i], np.int64)
        if not rows[i] and i in spoilt:
            skips.add("image, no annotation of it is left", i)
        elif not rows[i] and not keep_empty:
            empty.append(i)
        elif base_only and min(width, height) < protocol.min_image_side_px:
            skips.add(f"image with a side under {protocol.min_image_side_px} px", i)
        else:
            labels = np.array([label_of[c] for c in found.categories[own].tolist()], np.int64)
            present = np.bincount(labels, minlength=len(wanted)) > 0
            judged = None
            if protocol.federated:
                absent, unfinished = federated_classes(found, [i], asked, protocol)
                judged = (absent[0] | present) & ~unfinished[0]
            kept.append(ImageBoxes(i, name, width, height, found.corners[own], labels, found.ids[own], judged))
    return Split(kept, folder, annotations, coco_ids, skips, empty=empty)


def _usable(found: Instances, wanted: set[int], base_only: bool, skips: Skips) -> tuple[dict[int, list[int]], set[int]]:
    """The rows of each image that are boxes of the wanted categories, with `base_only` without crowds; and the images
    that lost one, which is added to `skips`, as is one of no known category.
    """
    rows, spoilt = {i: list[int]() for i in found.images}, set[int]()
    for row, (image_id, category) in enumerate(zip(found.image_ids.tolist(), found.categories.tolist(), strict=True)):
        if category in found.names and (category not in wanted or (base_only and found.crowd[row])):
            continue
        if row in found.odd:
            skips.add(f"annotation, {found.odd[row]}", int(found.ids[row]))
            spoilt.add(image_id)
        else:
            rows[image_id].append(row)
    return rows, spoilt


def federated_classes(
    found: Instances, image_ids: Sequence[int], coco_ids: Sequence[int], protocol: Protocol
) -> tuple[np.ndarray, np.ndarray]:
    """(I, K) bool each, of images and classes: which are known not to be there, and of which not all objects are
    annotated. Raises HdovdError for an image of which the file does not say it.
    """
    import numpy as np

    absent, unfinished = np.zeros((2, len(image_ids), len(coco_ids)), bool)
    for row, image_id in enumerate(image_ids):
        if image_id not in found.absent:
            raise HdovdError(
                f"{found.file}: image {image_id} has no neg_category_ids, which say what is known not to be in it: "
                f"protocol {protocol.name} is for LVIS's annotations, not for COCO's"
            )
        absent[row] = np.isin(coco_ids, found.absent[image_id])
        unfinished[row] = np.isin(coco_ids, found.unfinished.get(image_id, ()))
    return absent, unfinished


@dataclass(slots=True)
class Instances:
    """An instances file, every value of the type that its key has, as columns of A annotations, in file order.

    folder: of the pictures. images: id -> (file name, width, height), in file order. names: category id -> name. ids,
    image_ids, categories (A,) int64; crowd, ignored (A,) bool: what says `iscrowd` and `ignore`; boxes (A, 4) float64:
    x, y, w, h as the file has them, NaN for what is no box; areas (A,), NaN where there is none; corners (A, 4)
    float32: xyxy inside the image, 0 for what cannot be used; odd: why that is, by row. absent, unfinished: of
    federated annotations (LVIS), by image id, the categories that are known not to be in an image, and those whose
    objects are not all annotated in it. As dicts, with outlines, the annotations of COCO's training images take
    gigabytes.
    """

    file: Path
    folder: Path
    images: dict[int, tuple[str, int, int]]
    names: dict[int, str]
    ids: np.ndarray
    image_ids: np.ndarray
    categories: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    corners: np.ndarray
    odd: dict[int, str]
    absent: dict[int, tuple[int, ...]]
    unfinished: dict[int, tuple[int, ...]]

    def of_classes(self, names: Collection[str]) -> np.ndarray:
        """(A,) bool: the annotations of these classes."""
        import numpy as np

        return np.isin(self.categories, [i for i, name in self.names.items() if name in names])


def read_instances(
    file: Path, folder: Path | None = None, federated: bool | None = None, *, any_bytes: bool = False
) -> Instances:
    """Read and check an instances file; its lists come in any order. `folder`: of the pictures, in which the names of
    files must lie; None: names stay as they are. `federated`: as `hdovd.data.forms.base.Form` has it. `any_bytes`:
    whether names of files may hold bytes that are no UTF-8, escaped as `os` has them.

    Raises HdovdError that names the file and the first entry that is not as it should be.
    """
    import numpy as np

    entries, categories, numbers, sides, fault = _lists(file)
    is_federated = any(_FEDERATED[0] in entry for entry in entries)
    if federated not in (None, is_federated):
        raise HdovdError(
            f"{file} is {_IN_WORDS[is_federated]}, but is read as {_IN_WORDS[federated]}: give the --form that the "
            "data are of"
        )
    names, images = _names(categories, file), _images(entries, file, folder, any_bytes)
    ids, image_ids, kinds, crowd, ignored = np.array(numbers, np.int64).reshape(-1, 5).T
    once, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise HdovdError(
            f"{file}: annotation id {once[counts > 1][0]} stands twice; the cache joins rows by it, so number them anew"
        )
    if fault is not None:
        raise fault
    table, corners, odd = np.array(sides).reshape(-1, 5), np.zeros((len(ids), 4), np.float32), dict[int, str]()
    for row, (image_id, kind) in enumerate(zip(image_ids.tolist(), kinds.tolist(), strict=True)):
        if image_id not in images:
            raise HdovdError(
                f"{file}: annotation {ids[row]} is for image {image_id}, which is not in its images; the file is "
                "damaged or was cut by hand"
            )
        box, why = clip_box(table[row, :4].tolist(), *images[image_id][1:])
        if box is None or kind not in names:
            odd[row] = why if kind in names else f"its category is none of {file.name}"
        else:
            corners[row] = box
    absent, unfinished = (
        {whole(entry["id"], key): _categories(entry, key, names, file) for entry in entries if key in entry}
        for key in _FEDERATED
    )
    return Instances(
        file,
        folder or Path(),
        images,
        names,
        ids,
        image_ids,
        kinds,
        crowd > 0,
        ignored > 0,
        table[:, :4],
        table[:, 4],
        corners,
        odd,
        absent,
        unfinished,
    )


def _lists(
    file: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], array[int], array[float], HdovdError | None]:
    """Images, categories, and of annotations what `_annotation` makes of them; and what is wrong with one: it is said
    where the file is known to be COCO's, and its images are. Raises HdovdError for a file that has no such lists.
    """
    entries, categories = list[Any](), list[Any]()
    numbers, sides = array("q"), array("d")  # five of each annotation
    fault: HdovdError | None = None
    stream, strange = JsonStream(file, "annotations"), False
    for key, item in stream:
        if key not in _PARTS:
            continue
        if key not in stream.lists or not isinstance(item, dict):
            strange = True
        elif key == "annotations" and fault is None:
            try:
                whole_ones, others = _annotation(item)
                numbers.extend(whole_ones)
                sides.extend(others)
            except HdovdError as error:
                called = item["id"] if type(item.get("id")) is int else f"number {len(numbers) // 5}"
                fault = HdovdError(f"{file}: annotation {called}{error}")
        elif key == "images":
            entries.append({k: item[k] for k in _IMAGE_KEYS if k in item})
        elif key == "categories":
            categories.append(item)
    if strange or not stream.lists >= _PARTS:
        raise HdovdError(f"{file} is no COCO instances file: it needs images, annotations and categories")
    return entries, categories, numbers, sides, fault


def _annotation(a: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Of an annotation: its id, image and category, whether it is a crowd, and to be ignored; x, y, w, h and area, NaN
    for what is not there. Raises HdovdError that says what is wrong with it.
    """
    if not {"id", "image_id", "category_id"} <= a.keys() or not ("bbox" in a or a.get("segmentation")):
        raise HdovdError(" lacks one of id, image_id, category_id, bbox (or segmentation)")
    box, crowd, area = a.get("bbox"), a.get("iscrowd"), a.get("area")
    if box is None and a.get("segmentation"):
        box = outline_box(a["segmentation"])
    numbers = [whole(a[key], f": {key}") for key in ("id", "image_id", "category_id")]
    if crowd not in (None, 0, 1):
        raise HdovdError(f": iscrowd is {shown(crowd)}, expected 0 or 1")
    if area is not None and not math.isfinite(number(area)):
        raise HdovdError(f": area is {shown(area)}, expected a number")
    return [*numbers, crowd == 1, bool(a.get("ignore"))], [*four_numbers(box), math.nan if area is None else area]


def whole(value: Any, where: str, least: int = -_MOST, most: int = _MOST) -> int:
    """`value` as a whole number; 3.0 is one. `where`: the key in the message. Raises HdovdError."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        wanted = "a whole number" if least < 0 else f"a whole number of {least} to {most:,d}"
        raise HdovdError(
            f"{where} is {shown(value)}, expected {wanted}"
            + (": write it without quotes" if isinstance(value, str) else "")
        )
    return value


def outline_box(segmentation: Any) -> Any:
    """The box (x, y, w, h) around polygons `[[x, y, x, y, ...], ...]` or a run-length mask `{"size", "counts"}`; None
    if it is neither.
    """
    if isinstance(segmentation, dict):
        return _mask_box(segmentation.get("size"), segmentation.get("counts"))
    if not isinstance(segmentation, list) or not all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(math.isfinite(number(v)) for v in p)
        for p in segmentation
    ):
        return None
    xs, ys = ([v for polygon in segmentation for v in polygon[first::2]] for first in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _mask_box(size: Any, counts: Any) -> list[float] | None:
    from pycocotools import mask  # here: it is slow to import, and such masks without a box are rare

    if not isinstance(size, list) or len(size) != 2 or not all(type(v) is int and 0 < v <= _LONGEST_SIDE for v in size):
        return None
    pixels = size[0] * size[1]
    if isinstance(counts, list):
        sound = all(type(count) is int and 0 <= count <= pixels for count in counts) and sum(counts) == pixels
    else:  # the last character says that no other follows
        sound = isinstance(counts, str) and re.fullmatch("[0-o]*[0-O]", counts) is not None
    if not sound:
        return None
    runs = {"size": size, "counts": counts}
    return list(map(float, mask.toBbox(mask.frPyObjects(runs, *size) if isinstance(counts, list) else runs)))


def _names(categories: list[dict[str, Any]], file: Path) -> dict[int, str]:
    """Category names by id. Raises HdovdError if two share an id or a name."""
    names: dict[int, str] = {}
    for place, category in enumerate(categories):
        number = whole(category.get("id"), f"{file}: category number {place}: id")
        name = checked_name(category.get("name"), f"{file}: category {number}: name")
        if number in names:
            raise HdovdError(
                f"{file}: category id {number} is both {names[number]!r} and {name!r}: were two files merged? Number "
                f"the categories anew, and their annotations with them"
            )
        names[number] = name
    if twice := sorted(name for name, count in Counter(names.values()).items() if count > 1):
        raise HdovdError(f"{file}: categories of the same name: {shorten(list(twice))}; rename or merge them")
    return names


def coco_ids_of(names: dict[int, str], protocol: Protocol, file: Path) -> tuple[int, ...]:
    """The category ids of a protocol's classes, by label. Raises HdovdError if the file lacks one."""
    id_of = {name: number for number, name in names.items()}
    if absent := [name for name in protocol.names if name not in id_of]:
        hints = "; ".join(
            f"{name!r}" + "".join(f" (the file has {near!r})" for near in get_close_matches(name, id_of, 1))
            for name in absent[:8]
        )
        raise HdovdError(
            f"protocol {protocol.name} names classes that {file} does not know: {hints}. "
            "Give the split that fits this data with --protocol"
        )
    return tuple(id_of[name] for name in protocol.names)


def _categories(entry: dict[str, Any], key: str, names: dict[int, str], file: Path) -> tuple[int, ...]:
    """The category ids that an image lists under a key of federated annotations. Raises HdovdError."""
    ids = entry[key]
    if not isinstance(ids, list) or not all(type(one) is int and one in names for one in ids):
        raise HdovdError(
            f"{file}: image {shown(entry['id'])}: {key} is {shown(ids)}, expected a list of ids of its categories"
        )
    return tuple(ids)


def _images(
    entries: list[dict[str, Any]], file: Path, folder: Path | None, any_bytes: bool
) -> dict[int, tuple[str, int, int]]:
    images: dict[int, tuple[str, int, int]] = {}
    for place, entry in enumerate(entries):
        name: Any = entry.get("file_name")
        number = whole(entry.get("id"), f"{file}: image number {place}: id")
        where = f"{file}: image {number}"
        if number in images:
            raise HdovdError(f"{file}: image id {number} stands twice")
        if name is None and "coco_url" in entry:
            name = _name_of_url(checked_name(entry["coco_url"], f"{where}: coco_url", LONGEST_PATH), folder)
        elif isinstance(name, str) and name.startswith("images/v") and folder and not (folder / "images").is_dir():
            name = "/".join(PurePosixPath(name).parts[-2:])  # Objects365 has images/v1/patch8/x.jpg in train/patch8
        checked_name(
            re.sub("[\udc80-\udcff]", "?", name) if any_bytes and isinstance(name, str) else name,
            f"{where}: file_name",
            LONGEST_PATH,
        )
        images[number] = (
            _inside(name, folder, file, where),
            whole(entry.get("width"), f"{where}: width", 1, _LONGEST_SIDE),
            whole(entry.get("height"), f"{where}: height", 1, _LONGEST_SIDE),
        )
    return images


def _name_of_url(url: str, folder: Path | None) -> str:
    """`.../train2017/0009.jpg`: its last part, or its last two, as LVIS has pictures of two folders, where the folder
    holds such a one.
    """
    *_, parent, name = ("", *PurePosixPath(url).parts)
    return f"{parent}/{name}" if folder is not None and parent and (folder / parent).is_dir() else name


def _inside(name: str, folder: Path | None, file: Path, where: str) -> str:
    """The name of a picture's file, relative to the folder; `..` may be meant from there or from the annotation `file`.
    Raises HdovdError if it lies elsewhere.
    """
    if folder is None or not (name.startswith("/") or ".." in name):
        return name
    root = os.path.abspath(folder)
    paths = [os.path.abspath(os.path.join(place, name)) for place in (root, file.parent)]
    path = next((path for path in paths if os.path.commonpath((root, path)) == root), None)
    if path is None:
        raise HdovdError(
            f"{where}: file_name is {shown(name)}, which lies outside of the image folder {folder}: give the folder "
            f"that holds all pictures with --images"
        )
    return os.path.relpath(path, root)


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Where a data set lies: the folder `root`, of the form of that name (`hdovd.data.forms`). `images` and
    `annotations`, a COCO instances file, override what it has; beside `annotations` a form that is not named is COCO's.
    """

    root: Path | None = None
    images: Path | None = None
    annotations: Path | None = None
    form: str = AUTO

    def load(self, split: str, protocol: Protocol, *, base_only: bool, exif: str = Exif.APPLY) -> Split:
        """`load_split` of `split` ("train2017", "val2017"), its pictures to be read by `exif`; what is skipped goes to
        `log`.
        """
        files = self.locate(split)
        federated = self._form().federated if self.annotations is None or self.form != AUTO else None
        loaded = load_split(*files, protocol, base_only=base_only, federated=federated)
        log(*loaded.skips.lines())
        if loaded.empty:
            classes, switch = ("base", "keep_empty_train") if base_only else ("protocol's", "keep_empty_val")
            log(
                f"left out {len(loaded.empty):,d}: image without an object of the {classes} classes "
                f"({shorten(list(loaded.empty))}); a protocol file with {switch} = true keeps them"
            )
        return replace(loaded, exif=Exif(exif))

    def has(self, split: str) -> bool:
        """Whether `locate` finds a split; False, which is told, for what is of no form or cannot be converted."""
        try:
            form, root = self._form(), self.root or Path()
            return form.annotations(root, split).is_file() and form.images(root, split).is_dir()
        except HdovdError as error:
            log(f"note: {split} cannot be used: {error}")
            return False

    def locate(self, split: str) -> tuple[Path, Path]:
        """The annotation file and the image folder of a split. Raises HdovdError if they are not there."""
        annotations, folder = self.annotation_file(split), self.image_folder(split)
        if not folder.is_dir():
            raise HdovdError(f"no image folder {folder}: give it with --images")
        return annotations, folder

    def image_folder(self, split: str) -> Path:
        """It need not be there."""
        return self.images or self._form().images(self.root or Path(), split)

    def annotation_file(self, split: str) -> Path:
        """Raises HdovdError if it is not there."""
        if self.root is None and (self.images is None or self.annotations is None):
            raise HdovdError("give --data ROOT, or both --images and --annotations")
        if self.root is not None and not self.root.is_dir():
            raise HdovdError(f"--data {self.root}: no such folder; expected a data set such as COCO's (docs/DATA.md)")
        annotations = self.annotations or self._form().annotations(self.root or Path(), split)
        if not annotations.is_file():
            raise HdovdError(f"annotations: no file {annotations}")
        return annotations

    def _form(self) -> Form:
        return find_form(COCO if self.annotations and self.form == AUTO else self.form, self.root or Path())
