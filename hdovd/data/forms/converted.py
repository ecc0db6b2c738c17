"""Forms that are converted to COCO's: Pascal VOC, YOLO, and exports of labelling tools.

VOC: an XML file a picture, and lists of the pictures of each split; of one year or of several. Its boxes count pixels
from 1 and include the last one: xmin 1 and xmax 10 are the first ten columns. Other tools count from 0, and leave the
last pixel out. Where a box of the data set begins below 1, all of them are read so.

YOLO, as Ultralytics and Roboflow have it: data.yaml, which names folders of pictures, or text files that list them, and
a text file of boxes for each picture. The boxes of images/train/x.jpg are in labels/train/x.txt; a picture without that
file is one without objects.

Label Studio's exports, as "JSON" or "JSON-MIN", and CVAT's, as "CVAT for images 1.1": those in the folder itself are of
training, as are those in its folder train; those in val are of validation. What is no upright box is counted and told.
Predictions, which nobody confirmed, are not read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, product
from math import cos, isfinite, radians, sin
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import yaml

from hdovd.core import HdovdError, log, shorten
from hdovd.core.picture_header import ENDINGS, upright_size
from hdovd.core.text_files import LONGEST_PATH, JsonStream, checked_name, cut, read_text, shown
from hdovd.data.forms.base import SPLITS, Form
from hdovd.data.forms.conversion import Box, Picture, converted, read_xml


def _lines(file: Path) -> list[str]:
    """The entries of a list."""
    return [line.strip() for line in read_text(file, "list").splitlines() if line.strip()]


# --- Pascal VOC ---

_LISTS = ("ImageSets/Main/*.txt", "VOC*/ImageSets/Main/*.txt", "VOCdevkit/VOC*/ImageSets/Main/*.txt")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Listed = tuple[Path, str]  # the folder of a year, and the name of a picture and its annotations there, without endings
_VocObject = tuple[str, list[float], bool]  # name, sides as the file has them, whether it is difficult


def _voc(root: Path, split: str) -> Path:
    """Validation is `test` of the years whose annotations of it are there, or if none are, `val`. Training is
    `trainval` of each year, or if there is none `train`, without the validation pictures.
    """
    years = sorted({file.parents[2] for pattern in _LISTS for file in root.glob(pattern)})
    tests = [test for year in years if (test := _voc_list(year, "test")) and _xml(test[0]).is_file()]
    validation = {*chain(*(tests or (_voc_list(year, "val") for year in years)))}
    training = {*chain(*(_voc_list(year, "trainval") or _voc_list(year, "train") for year in years))} - validation
    wanted = sorted(validation if split == "val2017" else training)
    if not wanted:
        return root / "ImageSets" / "Main" / f"{SPLITS[split]}.txt"
    files = _picture_files(training | validation)
    return converted(root, split, [*map(_xml, files), *files.values()], lambda: _read_voc(root, wanted, files))


def _voc_list(year: Path, name: str) -> list[_Listed]:
    """The pictures of a list; none if it is not there."""
    file = year / "ImageSets" / "Main" / f"{name}.txt"
    return [(year, line) for line in _lines(file)] if file.is_file() else []


def _xml(listed: _Listed) -> Path:
    return listed[0] / "Annotations" / f"{listed[1]}.xml"


def _picture_files(listed: Iterable[_Listed]) -> dict[_Listed, Path]:
    """The picture of each name, in order. Raises HdovdError if it is not there, or its annotations are not."""
    found, years = sorted(listed), sorted({year for year, _ in listed})
    known = {(year, file.stem): file for year in years for file in sorted((year / "JPEGImages").glob("*"))}
    for year, name in found:
        if (year, name) not in known or not _xml((year, name)).is_file():
            raise HdovdError(
                f"{year / 'ImageSets' / 'Main'} lists {shown(name)}, which is not both in {year / 'JPEGImages'} and in "
                f"{year / 'Annotations'}: is the download complete?"
            )
    return {one: known[one] for one in found}


def _read_voc(root: Path, wanted: Sequence[_Listed], files: dict[_Listed, Path]) -> tuple[list[str], list[Picture]]:
    """The classes of both splits, and the pictures of one."""
    read = {one: _voc_picture(_xml(one), file) for one, file in files.items()}
    below = [one for one, (_, objects) in read.items() if any(min(sides[:2]) < 1 for _, sides, _ in objects)]
    log(f"boxes count from 0, as one of {_xml(below[0])} does" if below else "boxes count from 1, as VOC's own do")
    first, names = 0 if below else 1, sorted({name for _, objects in read.values() for name, *_ in objects})
    return names, [
        (
            files[one].relative_to(root).as_posix(),
            *read[one][0],
            [
                (names.index(name), x - first, y - first, right - x + first, lower - y + first, difficult)
                for name, (x, y, right, lower), difficult in read[one][1]
            ],
        )
        for one in wanted
    ]


def _voc_picture(xml: Path, picture: Path) -> tuple[tuple[int, int], list[_VocObject]]:
    """The picture's width and height, by its own header if the file does not say it, and its objects."""
    tree = read_xml(xml, "Pascal VOC's", "annotation")
    width, height = (tree.findtext(f"size/{side}", "").strip() for side in ("width", "height"))
    said = re.fullmatch("[1-9][0-9]{0,8} [1-9][0-9]{0,8}", f"{width} {height}")
    objects = [
        _voc_object(one, f"{xml}: object {number}") for number, one in enumerate(tree.findall("object"), start=1)
    ]
    return (int(width), int(height)) if said else upright_size(picture), objects


def _voc_object(tree: ElementTree.Element, where: str) -> _VocObject:
    try:
        numbers = [float(tree.findtext(f"bndbox/{side}", "")) for side in _SIDES]
    except ValueError:
        numbers = []
    if not numbers or not all(map(isfinite, numbers)):
        found = cut(", ".join(tree.findtext(f"bndbox/{side}", "").strip() or "nothing" for side in _SIDES))
        raise HdovdError(f"{where}: bndbox holds {found}; expected the numbers {', '.join(_SIDES)}")
    return (
        checked_name(tree.findtext("name", "").strip(), f"{where}: name"),
        numbers,
        tree.findtext("difficult", "").strip() == "1",
    )


VOC = Form(_LISTS, _voc, lambda root, split: root)


# --- YOLO ---

_ROUNDING = 1e-3  # of a picture's side: what sticks out by more is an error, by less it is cut off
_EXPECTED = "expected 'class cx cy w h' or 'class x y x y x y ...', a box within 0 to 1"


def _yolo(root: Path, split: str) -> Path:
    file = root / "data.yaml"
    try:
        tree = yaml.safe_load(read_text(file, "--data"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HdovdError(f"{file} is not valid YAML ({cut(' '.join(str(error).split()))})") from error
    if not isinstance(tree, dict):
        raise HdovdError(f"{file} holds {shown(tree)}, expected names, train and val")
    if not tree.get(SPLITS[split]):
        return file.with_name(f"{SPLITS[split]} of data.yaml")
    names, pictures = _yolo_classes(tree.get("names"), file), _yolo_pictures(tree, SPLITS[split], file)
    labels = {picture: root / label_of(picture) for picture in pictures}
    there = [label for label in labels.values() if label.is_file()]
    if not there:
        raise HdovdError(f"{file}: no picture of {SPLITS[split]} has labels, such as {next(iter(labels.values()), '')}")

    def read() -> tuple[list[str], list[Picture]]:
        sizes = {picture: upright_size(root / picture) for picture in pictures}
        return names, [
            (picture, *size, [*_yolo_boxes(labels[picture], *size, len(names))]) for picture, size in sizes.items()
        ]

    return converted(root, split, [file, *there, *(root / picture for picture in pictures)], read)


def _yolo_classes(names: Any, file: Path) -> list[str]:
    """The classes in order, of a list or of {0: name, 1: name, ...}."""
    known = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(known, dict) or not known or {*known} != {*range(len(known))}:
        raise HdovdError(f"{file}: names is {shown(names)}, expected a list of names, or names by number from 0 on")
    return [checked_name(known[number], f"{file}: names: {number}") for number in range(len(known))]


def _yolo_pictures(tree: dict[str, Any], key: str, file: Path) -> list[str]:
    """The pictures of a split, in order, relative to the folder of data.yaml."""
    root, found, value = file.parent, set[str](), tree[key]
    base = root / checked_name(tree.get("path") or ".", f"{file}: path", LONGEST_PATH)
    base = base if base.is_dir() else root  # the path is often one of its author's machine
    for entry in value if isinstance(value, list) else [value]:
        place, where = base / checked_name(entry, f"{file}: {key}", LONGEST_PATH), f"{file}: {key}: {shown(entry)}"
        if not place.exists():  # Roboflow's files say ../train/images of what lies in train/images
            place = base / entry.removeprefix("../")
        if place.is_dir():
            inside = [one for one in place.rglob("*") if one.suffix.lower() in ENDINGS]
        elif place.is_file():
            inside = [place.parent / line for line in _lines(place)]
        else:
            raise HdovdError(f"{where}: there is no {place}, expected a folder of pictures or a file that lists them")
        found |= {_within(root, one, where) for one in inside}
    return sorted(found)


def _within(root: Path, picture: Path, where: str) -> str:
    """A picture's name relative to the root. Raises HdovdError if it lies elsewhere, or is not there."""
    name = os.path.relpath(picture, root)
    if name.startswith("..") or not picture.is_file():
        raise HdovdError(f"{where}: {picture} is no picture in {root}: give the folder that holds all with --data")
    return name


def label_of(picture: str) -> str:
    """images/train/x.jpg -> labels/train/x.txt: the last folder of that name is replaced."""
    before, found, after = f"/{os.path.splitext(picture)[0]}.txt".rpartition("/images/")
    return (f"{before}/labels/{after}" if found else after)[1:]


def _yolo_boxes(label: Path, width: int, height: int, classes: int) -> Iterator[Box]:
    """The boxes of a picture. Raises HdovdError, naming the line, for one that is none."""
    lines = read_text(label, "labels").splitlines() if label.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}: line {number} is {shown(line)}"
        try:
            kind, *sides = map(float, line.split())
        except ValueError:
            raise HdovdError(f"{where}, {_EXPECTED}") from None
        if not 0 <= kind < classes or kind % 1:
            raise HdovdError(f"{where}, of class {kind:g}, but data.yaml names {classes}, from 0 to {classes - 1}")
        xs, ys = sides[::2], sides[1::2]
        if len(sides) == 4:  # centre, width and height
            xs, ys = ([centre - size / 2, centre + size / 2] for centre, size in (xs, ys))
        inside = all(-_ROUNDING <= side <= 1 + _ROUNDING for side in (*xs, *ys))
        if not inside or len(xs) != len(ys) or len(sides) < 4 or (len(sides) == 4 and min(sides[2:]) < 0):
            raise HdovdError(f"{where}, {_EXPECTED}")
        x, right, y, lower = (min(max(side, 0.0), 1.0) for side in (min(xs), max(xs), min(ys), max(ys)))
        yield int(kind), x * width, y * height, (right - x) * width, (lower - y) * height, False


YOLO = Form(("data.yaml",), _yolo, lambda root, split: root)


# --- labelling tools ---

_PARTS = ("x", "y", "width", "height")
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
    folders = (folder / "images", folder, root / "images", root)
    for name in (*names, *(name.replace("\\", "/") for name in names)):  # exports of Windows
        parts = PurePosixPath(name.lstrip("/")).parts
        for place in (one.joinpath(*parts[start:]) for start in range(len(parts)) for one in folders):
            if ".." not in parts and os.path.isfile(place):
                return place.relative_to(root).as_posix()
    return ""


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
    every = task.get("annotations", ()) if "data" in task else [task]  # JSON-MIN has one, the task itself
    done = [one for one in every if not one.get("was_cancelled") and one.get("annotation_id", "") is not None]
    if not done:
        return _Labelled(names, notes=["pictures left out, without a finished annotation"])
    notes += ["pictures of several annotations, of which the ground truth counts, or the last"] * (len(done) > 1)
    if "data" in task:
        result = sorted(done, key=lambda one: bool(one.get("ground_truth")))[-1]["result"]
        regions = [(one.get("from_name", ""), one, one.get("value", {})) for one in result]
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
            x, y, w, h = (value[key] * side / 100 for key, side in zip(_PARTS, size * 2, strict=True))
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


def _image(image: ElementTree.Element, where: str) -> _Labelled:
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
            sides = _around(product((left, right), (top, lower)), ((left + right) / 2, (top + lower) / 2), degrees)
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
    return _Labelled(
        (f"{subset}/{name}".lstrip("/"), name),
        boxes,
        (int(image.attrib["width"]), int(image.attrib["height"])),
        notes,
        split,
    )


LABEL_STUDIO = _form("project-*.json", _tasks, _task)  # as the tools call their files
CVAT = _form("annotations*.xml", lambda file: read_xml(file, "CVAT's", "annotations"), _image)
