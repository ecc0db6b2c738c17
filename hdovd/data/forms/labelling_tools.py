"""Exports of labelling tools: Label Studio's, as "JSON" or "JSON-MIN", and CVAT's, as "CVAT for images 1.1".

Exports in the folder itself are of training, as are those in its folder train; those in val are of validation. What is
no upright box is counted and told. Predictions, which nobody confirmed, are not read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from math import cos, isfinite, radians, sin
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree.ElementTree import Element

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.core.picture_header import ENDINGS, upright_size
from hdovd.core.text_files import LONGEST_PATH, JsonStream, checked_name, cut
from hdovd.data.forms.base import SPLITS, Form
from hdovd.data.forms.conversion import Picture, converted, read_xml

_SIDES = ("x", "y", "width", "height")
_BOXED = ("rectanglelabels", "polygonlabels")


class _Labelled(NamedTuple):
    """A picture of an export. names: what its file may be called, the likeliest first. boxes: class, x, y, width and
    height in pixels; None: it is left out. size: width and height; None: those of its file. notes: what was left out or
    changed. split: if the export says it. classes: that there are besides. lists: of labels, that the boxes are of.
    """

    names: Sequence[str] = ()
    boxes: Sequence[tuple[str, float, float, float, float]] | None = None
    size: tuple[int, int] | None = None
    notes: Sequence[str] = ()
    split: str = ""
    classes: Iterable[str] = ()
    lists: Iterable[str] = ()


_Read = Callable[[Any, str], _Labelled]  # of a part of an export, and where it stands, for messages


def _form(pattern: str, parts: Callable[[Path], Iterable[Any]], read: _Read) -> Form:
    """The form of exports whose files are called so, and are of such parts."""
    patterns = (pattern, *(f"{folder}/{pattern}" for folder in SPLITS.values()))

    def annotations(root: Path, split: str) -> Path:
        files = [file for one in patterns for file in sorted(root.glob(one))]
        every = ((file, number, part) for file in files for number, part in enumerate(parts(file), start=1))
        pictures = (file for file in sorted(root.rglob("*")) if file.suffix.lower() in ENDINGS)  # where they lie counts
        made = converted(root, split, [*files, *pictures], lambda: _read_all(root, split, every, read))
        if files and split == "train2017" and not made.is_file():
            raise HdovdError(f"{root}: {shorten([file.name for file in files])} hold no finished picture of training")
        return made if made.is_file() else root / SPLITS[split] / pattern

    return Form(patterns, annotations, lambda root, split: root)


def _read_all(
    root: Path, split: str, parts: Iterable[tuple[Path, int, Any]], read: _Read
) -> tuple[list[str], list[Picture]]:
    """The classes of both splits, and the pictures of one. Raises HdovdError for pictures that are not there."""
    notes, found, lost = dict[str, list[str]](), dict[str, _Labelled](), list[str]()
    classes, lists, owners = set[str](), set[str](), dict[str, Sequence[str]]()
    for file, number, part in parts:
        where = f"{file}: number {number}"
        try:
            one = read(part, where)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise HdovdError(f"{where} is not as its tool writes it ({cut(repr(error))})") from error
        classes.update(one.classes, (kind for kind, *_ in one.boxes or ()))
        lists.update(one.lists)
        place = "" if one.boxes is None else _find(root, file.parent, one.names)
        if place and owners.setdefault(place, one.names) != one.names:
            both = [cut(max(names, key=len)) for names in (owners[place], one.names)]
            raise HdovdError(
                f"{where}: pictures {both[0]} and {both[1]} are both {place} here: give each a "
                f"file of its own, by the last parts of its name, or take one of them out"
            )
        if (one.split or ("val2017" if file.parent == root / "val" else "train2017")) != split:
            continue
        twice = ["pictures that stand several times, of which the last counts"] * (place in found)
        for note in (*one.notes, *twice):
            notes.setdefault(note, []).append(one.names[0])
        if place:
            found[place] = one
        elif one.boxes is not None:
            lost.append(cut(one.names[0]))
    if len(lists) > 1:
        raise HdovdError(
            f"{root}: boxes have labels of several lists ({shorten(sorted(lists))}), but classes are of one: take the "
            f"regions of the others out"
        )
    if lost:
        raise HdovdError(
            f"{root}: {len(lost)} of {len(lost) + len(found)} pictures of {split} are not there ({shorten(lost)}): put "
            f"them into {root / 'images'}, by these names or the last parts of them"
        )
    log(
        *(
            f"note: {root} ({split}): {len(names):,d} {note} ({shorten(list(dict.fromkeys(names)))})"
            for note, names in sorted(notes.items())
        )
    )
    number_of = {kind: number for number, kind in enumerate(sorted(classes))}
    return list(number_of), [
        (place, *(one.size or upright_size(root / place)), [(number_of[kind], *box, False) for kind, *box in one.boxes])  # type: ignore[union-attr]
        for place, one in sorted(found.items())
    ]


def _find(root: Path, folder: Path, names: Sequence[str]) -> str:
    """A picture, relative to the root, by all of a name or the last parts of it; empty if it is not there."""
    every = [*names, *(name.replace("\\", "/") for name in names)]  # exports of Windows
    parts = [part for name in every if ".." not in (part := PurePosixPath(name.lstrip("/")).parts)]
    folders = (folder / "images", folder, root / "images", root)
    places = (place.joinpath(*part[start:]) for part in parts for start in range(len(part)) for place in folders)
    return next((place.relative_to(root).as_posix() for place in places if os.path.isfile(place)), "")


def _around(
    corners: Iterable[tuple[float, float]], about: tuple[float, float] = (0.0, 0.0), degrees: float = 0.0
) -> tuple[float, float, float, float]:
    """x, y, width, height of the upright box around corners that are turned clockwise about a point. Raises ValueError
    for one that is not finite.
    """
    (px, py), c, s = about, cos(radians(degrees)), sin(radians(degrees))
    turned = [(px + c * (x - px) - s * (y - py), py + s * (x - px) + c * (y - py)) for x, y in corners]
    xs, ys = zip(*turned, strict=True)
    if not all(map(isfinite, (*xs, *ys))):
        raise ValueError("a side is not finite")
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


# --- Label Studio ---


def _tasks(file: Path) -> Iterator[Any]:
    return JsonStream(file, "annotations").items(
        "export of Label Studio: expected a list of tasks, its JSON or JSON-MIN"
    )


def _task(task: dict[str, Any], where: str) -> _Labelled:
    texts = {key: value for key, value in task.get("data", task).items() if isinstance(value, str)}
    pictures = [text for text in texts.values() if PurePosixPath(_path(text)).suffix.lower() in ENDINGS]
    found = [texts["image"]] if "image" in texts else pictures
    if len(found) != 1:
        raise HdovdError(f"{where} names {len(found)} pictures, expected one, by the name image if there are several")
    checked_name(found[0], f"{where}: picture", LONGEST_PATH)
    plain = [checked_name(_path(found[0]), f"{where}: picture", LONGEST_PATH), found[0]]  # "#" may be of the name
    names = [*plain, *(re.sub(r"(^|/)[0-9a-f]{8}-([^/]+)$", r"\1\2", name) for name in plain)]  # uploads' numbers
    boxes, notes, lists, size = list[Any](), list[str](), set[str](), None
    if "data" in task:
        done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
        if not done:
            return _Labelled(names, notes=["pictures left out, without a finished annotation"])
        notes += ["pictures of several annotations, of which the ground truth counts, or the last"] * (len(done) > 1)
        result = sorted(done, key=lambda one: bool(one.get("ground_truth")))[-1]["result"]
        regions = [(one.get("from_name", ""), one, one.get("value", {})) for one in result]
    elif task.get("annotation_id", "") is None:
        return _Labelled(names, notes=["pictures left out, without a finished annotation"])
    else:
        regions = [
            (key, one, one) for key, own in task.items() if isinstance(own, list) for one in own if type(one) is dict
        ]
    for source, about, value in regions:
        kind = next((key for key in value if key.endswith("labels")), about.get("type", "regions without a label"))
        if kind not in _BOXED or len(value[kind]) != 1:
            several = f" of {len(value[kind])} labels" if kind in _BOXED else ""
            notes.append(f"left out: {cut(kind, 80)}{several}")
            continue
        lists.add(source)
        size = width, height = about["original_width"], about["original_height"]
        label = checked_name(value[kind][0], f"{where}: label")
        if "points" in value:
            boxes.append((label, *_around((x * width / 100, y * height / 100) for x, y in value["points"])))
        else:
            x, y, w, h = (value[key] * side / 100 for key, side in zip(_SIDES, size * 2, strict=True))
            boxes.append((label, *_around(product((x, x + w), (y, y + h)), (x, y), value.get("rotation") or 0)))
        if "points" in value or value.get("rotation"):
            notes.append(f"taken as the upright box around each: {kind}")
    return _Labelled(names, boxes, size, notes, lists=lists)


def _path(address: str) -> str:
    """The path of a picture's address; of /data/local-files/?d=PATH what follows; empty for what is no address."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    path = unquote(parts.path)
    return parse_qs(parts.query).get("d", [path])[0] if path.endswith("/local-files/") else path


# --- CVAT ---


def _image(image: Element, where: str) -> _Labelled:
    """An image; or of another element the classes that it declares."""
    if image.tag == "track":
        raise HdovdError(f"{where} is a track of a video: export it as CVAT for images 1.1")
    if image.tag != "image":
        return _Labelled(classes=[checked_name(one.findtext("name"), f"{where}: label") for one in image.iter("label")])
    name, subset = checked_name(image.get("name"), f"{where}: name", LONGEST_PATH), image.get("subset", "")
    boxes, notes = list[Any](), list[str]()
    for shape in image:
        degrees = float(shape.get("rotation", 0))
        if shape.tag == "box":
            left, top, right, lower = (float(shape.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
            middle = ((left + right) / 2, (top + lower) / 2)
            sides = _around(product((left, right), (top, lower)), middle, degrees)
        elif shape.tag == "polygon":
            points = (one.split(",") for one in shape.attrib["points"].split(";"))
            sides = _around((float(x), float(y)) for x, y in points)
        else:
            notes.append(f"left out: {cut(shape.tag, 80)}")
            continue
        if shape.tag == "polygon" or degrees:
            notes.append(f"taken as the upright box around each: {shape.tag}")
        boxes.append((checked_name(shape.get("label"), f"{where}: label"), *sides))
    split = ("val2017" if subset.lower().startswith(("val", "test")) else "train2017") if subset else ""
    size = int(image.attrib["width"]), int(image.attrib["height"])
    return _Labelled((f"{subset}/{name}".lstrip("/"), name), boxes, size, notes, split)


LABEL_STUDIO = _form("project-*.json", _tasks, _task)  # as the tools call their files
CVAT = _form("annotations*.xml", lambda file: read_xml(file, "CVAT's", "annotations"), _image)
