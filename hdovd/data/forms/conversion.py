"""Annotations of other forms, converted to COCO instances files in the user's own folder: once, and again when they
change.

The same annotations give the same bytes, so that identities in caches and runs are those of the data.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from hdovd.core import HdovdError, log, user_cache_folder
from hdovd.core.text_files import cut, read_text

VERSION = 2  # of what is written: another one converts anew

# The class's place in the list of names; x, y, width and height, pixels from the picture's upper left corner; whether
# the object is ignored: not trained on, and in evaluation neither found nor missed, as COCO's crowds.
Box = tuple[int, float, float, float, float, bool]
Picture = tuple[str, int, int, list[Box]]  # file name in the form's image folder; width and height, upright; boxes


def converted(
    root: Path, split: str, sources: Iterable[Path], read: Callable[[], tuple[Sequence[str], Sequence[Picture]]]
) -> Path:
    """The COCO file of a split, made of the names of classes and the pictures of `read` if it is not there yet. It is
    not there afterwards if there are no pictures.

    sources: all files that these depend on, known by path, size and time of change.
    """
    about = [(os.path.abspath(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in sources]
    key = hashlib.sha256(repr((VERSION, read.__module__, os.path.abspath(root), about)).encode()).hexdigest()
    file = user_cache_folder() / "data" / f"{Path(os.path.abspath(root)).name[-30:]}-{split}-{key[:24]}.json"
    if not file.is_file():
        log(f"converting the annotations of {root} ({split}) to COCO's form: {file}")
        names, pictures = read()
        if not pictures:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".partial-") as folder:
            partial = Path(folder, file.name)
            with partial.open("w", encoding="utf-8") as out:
                out.write(json.dumps(_coco(names, pictures)))
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
    return file


def _coco(names: Sequence[str], pictures: Sequence[Picture]) -> dict[str, list[dict[str, object]]]:
    """Pictures and boxes are numbered by the names of files, so that proposals and cached rows of a picture stay its
    own when others come or go; classes from 1.
    """
    return {
        "images": [
            {"id": _number(name), "file_name": name, "width": width, "height": height}
            for name, width, height, _ in pictures
        ],
        "annotations": [
            {
                "id": _number(f"{name}/{place}"),
                "image_id": _number(name),
                "category_id": kind + 1,
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": int(ignored),
            }
            for name, *_, own in pictures
            for place, (kind, x, y, width, height, ignored) in enumerate(own)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
    }


def _number(name: str) -> int:
    """Of 53 bits, which JSON readers hold exactly; readers of the file refuse two of the same."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()) >> 11


def read_xml(file: Path, whose: str, tag: str) -> ElementTree.Element:
    """The first element of an XML file, which has that tag. `whose`: the form, in messages. Raises HdovdError, also for
    a file that declares a document type or entities: they could make it grow, or name other files.
    """
    text = read_text(file, "annotations", f"{whose} XML")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise HdovdError(f"{file} declares a document type or entities, which are not read: take them out")
    try:
        tree = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise HdovdError(f"{file} is not valid XML ({cut(str(error))}); is the download complete?") from error
    if tree.tag != tag:
        raise HdovdError(f"{file} begins with <{cut(tree.tag, 80)}>, expected {whose} <{tag}>")
    return tree
