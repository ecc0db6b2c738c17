"""Which nouns may name an image's pseudo boxes (METHOD section 2), for extraction.

Without captions: the whole vocabulary, the same for every image. With captions, or a file of `hdovd nouns`: the
vocabulary's names that the image's own captions hold. See `matching` for how they are found.

COCO captions are read one at a time, `{"images": [...], "annotations": [{"image_id": 1, "caption": "A dog."}]}`: the
file of COCO's training images holds 591,753. The file of nouns by image is written by `find`:

    {"format": "hdovd nouns", "version": 1, "made_by": {...}, "vocabulary": ["cat", "hot dog"], "images": {"139": [0,
    1]}, ...}

`images`: for each image id the rows of `vocabulary` that its captions hold, in ascending order. `unmatched`: words of
the captions that the vocabulary lacks, with the number of captions.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdovd.core.errors import HdovdError
from hdovd.core.text_files import JsonStream, checked_name, cut, read_json, shown
from hdovd.data.coco import whole
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.nouns.matching import MatchFinder, StopList, noun_words, singular_of


def read_captions(path: Path, images: set[int]) -> Iterator[tuple[int, str]]:
    """`(image id, caption)` of each caption. `images`: takes the ids that the file lists, those without captions too.

    Raises HdovdError if there is no such file, or an entry is no caption.
    """
    stream, number = JsonStream(path, "captions"), 0
    for key, item in stream:
        if key == "images" and key in stream.lists and isinstance(item, dict) and "id" in item:
            images.add(whole(item["id"], f"{path}: an image's id"))
        if key != "annotations" or key not in stream.lists:
            continue
        where = f"{path}: entry {number} of annotations"
        if not isinstance(item, dict) or not {"image_id", "caption"} <= item.keys():
            raise HdovdError(f"{where} is no {{image_id, caption}}")
        if not isinstance(item["caption"], str):
            raise HdovdError(f"{where}: caption is {shown(item['caption'])}, expected text")
        image_id = whole(item["image_id"], f"{where}: image_id")
        number += 1
        images.add(image_id)
        yield image_id, item["caption"].encode(errors="replace").decode()  # halves of surrogate pairs are no text
    if "annotations" not in stream.lists:
        raise HdovdError(f"{path} is no COCO captions file: it needs annotations of {{image_id, caption}}")


@dataclass(frozen=True, slots=True)
class Nouns:
    """`vocabulary` in row order; `by_image` the rows that each image offers, or None: all, for every image."""

    vocabulary: tuple[str, ...]
    by_image: dict[int, tuple[int, ...]] | None

    def offered(self, image_id: int) -> tuple[int, ...]:
        if self.by_image is None:
            return tuple(range(len(self.vocabulary)))
        return self.by_image.get(image_id, ())


def read_nouns(vocabulary: Path, captions: Path | None) -> Nouns:
    """The nouns that images offer. Raises HdovdError if the captions hold no word of the vocabulary."""
    names = read_vocabulary(vocabulary)
    if captions is None:
        return Nouns(names, None)
    row_of = {name: row for row, name in enumerate(names)}
    found: dict[int, set[int]] = {}
    for one in MatchFinder(names, StopList())(read_captions(captions, set())):
        found.setdefault(one.image_id, set()).update(row_of[name] for name in one.nouns)
    if not any(found.values()):
        raise HdovdError(
            f"no caption of {captions} holds a word of {vocabulary} ({len(names)} names): are they of one language?"
        )
    return Nouns(names, {image_id: tuple(sorted(rows)) for image_id, rows in found.items()})


def offered_nouns(nouns: Path | None, vocabulary: Path | None, captions: Path | None) -> Nouns | None:
    """The nouns of an extraction, by its files; None if it names no pseudo boxes. Raises HdovdError for files that do
    not fit.
    """
    if nouns is not None:
        return read_noun_file(nouns)
    return None if vocabulary is None else read_nouns(vocabulary, captions)


def meaning(name: str) -> str:
    """What names have in common that differ in case, number, signs and spaces alone, or in what LVIS adds in brackets:
    "Hot-dogs" and "hotdog" are one, and "car_(automobile)" is "cars".
    """
    return "".join(singular_of(noun_words(re.sub(r"\([^()]*\)", " ", name) or name)))


def named_novel(vocabulary: Sequence[str], novel: Sequence[str]) -> list[str]:
    """The novel class names that a vocabulary holds, in whatever form: allowed, since captions hold them, but
    reported."""
    have = set(map(meaning, vocabulary))
    return [name for name in novel if meaning(name) in have]


FORMAT, VERSION = "hdovd nouns", 1


def write_noun_file(path: Path, nouns: Nouns, made_by: Mapping[str, Any], unmatched: Mapping[str, int]) -> None:
    """The file appears whole or not at all; the same nouns give the same bytes, in whatever order the captions were."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": made_by,
        "vocabulary": nouns.vocabulary,
        "unmatched": unmatched,
    }
    lines = [f'"{image_id}": {json.dumps(rows)}' for image_id, rows in sorted((nouns.by_image or {}).items())]
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
    if twice := [name for name, count in Counter(vocabulary).items() if count > 1]:
        raise HdovdError(f"{where}: vocabulary holds {min(twice)!r} twice")
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
