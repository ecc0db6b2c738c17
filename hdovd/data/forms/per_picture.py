"""Pascal VOC and YOLO: a file of boxes for each picture, and lists or folders of the pictures of each split.

VOC: an XML file a picture, of one year or of several. Its boxes count pixels from 1 and include the last one: xmin 1
and xmax 10 are the first ten columns. Other tools count from 0, and leave the last pixel out. Where a box of the data
set begins below 1, all of them are read so.

YOLO, as Ultralytics and Roboflow have it: data.yaml, which names folders of pictures, or text files that list them. The
boxes of images/train/x.jpg are in labels/train/x.txt; a picture without that file is one without objects.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.picture_header import ENDINGS, upright_size
from hdovd.core.text_files import LONGEST_PATH, checked_name, cut, read_text, shown
from hdovd.data.forms.base import SPLITS, Form
from hdovd.data.forms.conversion import Box, Picture, converted, read_xml


def _lines(file: Path) -> list[str]:
    """The entries of a list."""
    return [line.strip() for line in read_text(file, "list").splitlines() if line.strip()]


# --- Pascal VOC ---

_LISTS = ("ImageSets/Main/*.txt", "VOC*/ImageSets/Main/*.txt", "VOCdevkit/VOC*/ImageSets/Main/*.txt")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Listed = tuple[Path, str]  # the folder of a year, and the name of a picture and its annotations there, without endings
_Object = tuple[str, list[float], bool]  # name, sides as the file has them, whether it is difficult


def _voc(root: Path, split: str) -> Path:
    """Validation is `test` of the years whose annotations of it are there, or if none are, `val`. Training is
    `trainval` of each year, or if there is none `train`, without the validation pictures.
    """
    years = sorted({file.parents[2] for pattern in _LISTS for file in root.glob(pattern)})
    tests = [test for year in years if (test := _list(year, "test")) and _xml(test[0]).is_file()]
    validation = {*chain(*(tests or (_list(year, "val") for year in years)))}
    training = {*chain(*(_list(year, "trainval") or _list(year, "train") for year in years))} - validation
    wanted = sorted(validation if split == "val2017" else training)
    if not wanted:
        return root / "ImageSets" / "Main" / f"{SPLITS[split]}.txt"
    files = _picture_files(training | validation)
    sources = [*map(_xml, files), *files.values()]
    return converted(root, split, sources, lambda: _read_voc(root, wanted, files))


def _list(year: Path, name: str) -> list[_Listed]:
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
    read = {one: _read(_xml(one), file) for one, file in files.items()}
    below = [one for one, (_, objects) in read.items() if any(min(sides[:2]) < 1 for _, sides, _ in objects)]
    log(f"boxes count from 0, as one of {_xml(below[0])} does" if below else "boxes count from 1, as VOC's own do")
    first, names = 0 if below else 1, sorted({name for _, objects in read.values() for name, *_ in objects})
    pictures = [
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
    return names, pictures


def _read(xml: Path, picture: Path) -> tuple[tuple[int, int], list[_Object]]:
    """The picture's width and height, by its own header if the file does not say it, and its objects."""
    tree = read_xml(xml, "Pascal VOC's", "annotation")
    width, height = (tree.findtext(f"size/{side}", "").strip() for side in ("width", "height"))
    said = re.fullmatch("[1-9][0-9]{0,8} [1-9][0-9]{0,8}", f"{width} {height}")
    objects = [_object(one, f"{xml}: object {number}") for number, one in enumerate(tree.findall("object"), start=1)]
    return (int(width), int(height)) if said else upright_size(picture), objects


def _object(tree: ElementTree.Element, where: str) -> _Object:
    try:
        numbers = [float(tree.findtext(f"bndbox/{side}", "")) for side in _SIDES]
    except ValueError:
        numbers = []
    if not numbers or not all(map(isfinite, numbers)):
        found = cut(", ".join(tree.findtext(f"bndbox/{side}", "").strip() or "nothing" for side in _SIDES))
        raise HdovdError(f"{where}: bndbox holds {found}; expected the numbers {', '.join(_SIDES)}")
    name = checked_name(tree.findtext("name", "").strip(), f"{where}: name")
    return name, numbers, tree.findtext("difficult", "").strip() == "1"


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
    names, pictures = _classes(tree.get("names"), file), _pictures(tree, SPLITS[split], file)
    labels = {picture: root / label_of(picture) for picture in pictures}
    there = [label for label in labels.values() if label.is_file()]
    if not there:
        raise HdovdError(f"{file}: no picture of {SPLITS[split]} has labels, such as {next(iter(labels.values()), '')}")

    def read() -> tuple[list[str], list[Picture]]:
        sizes = {picture: upright_size(root / picture) for picture in pictures}
        return names, [
            (picture, *size, [*_boxes(labels[picture], *size, len(names))]) for picture, size in sizes.items()
        ]

    return converted(root, split, [file, *there, *(root / picture for picture in pictures)], read)


def _classes(names: Any, file: Path) -> list[str]:
    """The classes in order, of a list or of {0: name, 1: name, ...}."""
    known = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(known, dict) or not known or {*known} != {*range(len(known))}:
        raise HdovdError(f"{file}: names is {shown(names)}, expected a list of names, or names by number from 0 on")
    return [checked_name(known[number], f"{file}: names: {number}") for number in range(len(known))]


def _pictures(tree: dict[str, Any], key: str, file: Path) -> list[str]:
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


def _boxes(label: Path, width: int, height: int, classes: int) -> Iterator[Box]:
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
