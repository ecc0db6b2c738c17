"""Pascal VOC: an XML file a picture, and lists of the pictures of each split; of one year or of several.

VOC's boxes count pixels from 1 and include the last one: xmin 1 and xmax 10 are the first ten columns. Other tools
count from 0, and leave the last pixel out. Where a box of the data set begins below 1, all of them are read so.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from xml.etree import ElementTree

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.picture_header import upright_size
from hdovd.core.text_files import checked_name, cut, read_text, shown
from hdovd.data.forms.base import SPLITS, Form
from hdovd.data.forms.conversion import Picture, converted, read_xml

_LISTS = ("ImageSets/Main/*.txt", "VOC*/ImageSets/Main/*.txt", "VOCdevkit/VOC*/ImageSets/Main/*.txt")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_Listed = tuple[Path, str]  # the folder of a year, and the name of a picture and its annotations there, without endings
_Object = tuple[str, list[float], bool]  # name, sides as the file has them, whether it is difficult


def _annotations(root: Path, split: str) -> Path:
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
    return converted(root, split, sources, lambda: _read_all(root, wanted, files))


def _list(year: Path, name: str) -> list[_Listed]:
    """The pictures of a list; none if it is not there."""
    file = year / "ImageSets" / "Main" / f"{name}.txt"
    lines = read_text(file, "list").splitlines() if file.is_file() else []
    return [(year, line.strip()) for line in lines if line.strip()]


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


def _read_all(root: Path, wanted: Sequence[_Listed], files: dict[_Listed, Path]) -> tuple[list[str], list[Picture]]:
    """The classes of both splits, and the pictures of one."""
    read = {one: _read(_xml(one), file) for one, file in files.items()}
    below = [one for one, (_, objects) in read.items() if any(min(sides[:2]) < 1 for _, sides, _ in objects)]
    log(f"boxes count from 0, as one of {_xml(below[0])} does" if below else "boxes count from 1, as VOC's own do")
    first, names = 0 if below else 1, sorted({name for _, objects in read.values() for name, *_ in objects})
    pictures = []
    for one in wanted:
        (width, height), objects = read[one]
        boxes = [
            (names.index(name), x - first, y - first, right - x + first, lower - y + first, difficult)
            for name, (x, y, right, lower), difficult in objects
        ]
        pictures.append((files[one].relative_to(root).as_posix(), width, height, boxes))
    return names, pictures


def _read(xml: Path, picture: Path) -> tuple[tuple[int, int], list[_Object]]:
    """The picture's width and height, by its own header if the file does not say it, and its objects."""
    tree = read_xml(xml, "Pascal VOC's", "annotation")
    width, height = (tree.findtext(f"size/{side}", "").strip() for side in ("width", "height"))
    said = re.fullmatch("[1-9][0-9]{0,8} [1-9][0-9]{0,8}", f"{width} {height}")
    objects = [_object(one, f"{xml}: object {number}") for number, one in enumerate(tree.findall("object"), start=1)]
    return (int(width), int(height)) if said else upright_size(picture), objects


def _object(tree: ElementTree.Element, where: str) -> _Object:
    sides = [tree.findtext(f"bndbox/{side}", "").strip() for side in _SIDES]
    try:
        numbers = [float(side) for side in sides]
    except ValueError:
        numbers = []
    if not numbers or not all(map(isfinite, numbers)):
        found = cut(", ".join(side or "nothing" for side in sides))
        raise HdovdError(f"{where}: bndbox holds {found}; expected the numbers {', '.join(_SIDES)}")
    name = checked_name(tree.findtext("name", "").strip(), f"{where}: name")
    return name, numbers, tree.findtext("difficult", "").strip() == "1"


VOC = Form(_LISTS, _annotations, lambda root, split: root)
