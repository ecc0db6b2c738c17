"""YOLO's form, as Ultralytics and Roboflow have it: data.yaml, and a text file of boxes for each picture.

data.yaml names folders of pictures, or text files that list them. The boxes of images/train/x.jpg are in
labels/train/x.txt; a picture without that file is one without objects.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hdovd.core.errors import HdovdError
from hdovd.core.picture_header import ENDINGS, upright_size
from hdovd.core.text_files import LONGEST_PATH, checked_name, cut, read_text, shown
from hdovd.data.forms.base import SPLITS, Form
from hdovd.data.forms.conversion import Box, Picture, converted

_ROUNDING = 1e-3  # of a picture's side: what sticks out by more is an error, by less it is cut off
_EXPECTED = "expected 'class cx cy w h' or 'class x y x y x y ...', a box within 0 to 1"


def _annotations(root: Path, split: str) -> Path:
    file = root / "data.yaml"
    try:
        tree = yaml.safe_load(read_text(file, "--data"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HdovdError(f"{file} is not valid YAML ({cut(' '.join(str(error).split()))})") from error
    if not isinstance(tree, dict):
        raise HdovdError(f"{file} holds {shown(tree)}, expected names, train and val")
    if not tree.get(SPLITS[split]):
        return file.with_name(f"{SPLITS[split]} of data.yaml")
    names, pictures = _names(tree.get("names"), file), _pictures(tree, SPLITS[split], file)
    labels = {picture: root / label_of(picture) for picture in pictures}
    there = [label for label in labels.values() if label.is_file()]
    if not there:
        raise HdovdError(f"{file}: no picture of {SPLITS[split]} has labels, such as {next(iter(labels.values()), '')}")

    def read() -> tuple[list[str], list[Picture]]:
        found = []
        for picture, label in labels.items():
            size = upright_size(root / picture)
            found.append((picture, *size, [*_boxes(label, *size, len(names))] if label.is_file() else []))
        return names, found

    return converted(root, split, [file, *there, *(root / picture for picture in pictures)], read)


def _names(names: Any, file: Path) -> list[str]:
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
            lines = read_text(place, "list").splitlines()
            inside = [place.parent / line.strip() for line in lines if line.strip()]
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
    for number, line in enumerate(read_text(label, "labels").splitlines(), start=1):
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


YOLO = Form(("data.yaml",), _annotations, lambda root, split: root)
