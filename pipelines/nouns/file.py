"""The file of nouns by image: written by `find`, read by extraction.

    {"format": "hdovd nouns", "version": 1, "made_by": {...}, "vocabulary": ["cat", "hot dog"], "images": {"139": [0,
    1]}, ...}

`images`: for each image id the rows of `vocabulary` that its captions hold, in ascending order. `unmatched`: words of
the captions that the vocabulary lacks, with the number of captions.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hdovd.core.errors import HdovdError
from hdovd.core.text_files import checked_name, cut, read_json, shown
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.nouns.allowed import Nouns

FORMAT, VERSION = "hdovd nouns", 1


def write_noun_file(path: Path, nouns: Nouns, made_by: Mapping[str, Any], unmatched: Mapping[str, int]) -> None:
    """The file appears whole or not at all; the same nouns give the same bytes, in whatever order the captions were."""
    assert nouns.by_image is not None
    head = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_by,
        "vocabulary": nouns.vocabulary,
        "unmatched": unmatched,
    }
    lines = [f'"{image_id}": {json.dumps(rows)}' for image_id, rows in sorted(nouns.by_image.items())]
    text = (
        json.dumps(head)[:-1] + ',\n"images": {\n' + ",\n".join(lines) + "\n}}\n"
    )  # one image a line: for people, and for diff
    write_text(path, text)


def read_noun_file(path: Path) -> Nouns:
    """Raises HdovdError if it is no such file, or a row is none of its vocabulary."""
    tree, where = read_json(path, "--nouns"), f"--nouns {path}"
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise HdovdError(
            f'{where} is no file of nouns: expected {{"format": "{FORMAT}", ...}}; make one with hdovd nouns'
        )
    if tree.get("version") != VERSION:
        raise HdovdError(
            f"{where} is of version {shown(tree.get('version'))}, this hdovd reads {VERSION}: make it again with hdovd "
            f"nouns"
        )
    vocabulary, images = tree.get("vocabulary"), tree.get("images")
    if not isinstance(vocabulary, list) or not vocabulary:
        raise HdovdError(f"{where}: vocabulary must be a list of names")
    for row, name in enumerate(vocabulary):
        checked_name(name, f"{where}: vocabulary must be a list of names: number {row}")
    if len(set(vocabulary)) < len(vocabulary):
        twice = sorted({n for n in vocabulary if vocabulary.count(n) > 1})
        raise HdovdError(f"{where}: vocabulary holds {twice[0]!r} twice")
    if not isinstance(images, dict):
        raise HdovdError(f"{where}: images must be rows by image id, not {shown(images)}")
    by_image: dict[int, tuple[int, ...]] = {}
    for image_id, rows in images.items():
        if not re.fullmatch("-?[0-9]{1,18}", image_id):
            raise HdovdError(f"{where}: images has {shown(image_id)}, expected an image id")
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < len(vocabulary) for row in rows):
            raise HdovdError(
                f"{where}: image {image_id} has {cut(str(rows), 80)}, expected rows of the vocabulary, 0 to "
                f"{len(vocabulary) - 1}"
            )
        by_image[int(image_id)] = tuple(sorted(set(rows)))
    if not any(by_image.values()):
        raise HdovdError(f"{where} holds no image with a noun; make it again with hdovd nouns")
    return Nouns(tuple(vocabulary), by_image)
