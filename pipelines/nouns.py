"""Which nouns may name an image's pseudo boxes (METHOD section 2).

With captions: the vocabulary's words that the image's own captions hold. Without: the whole vocabulary, the
same for every image. Plain matching of whole words, the longest name first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hdovd.coco import read_json
from hdovd.errors import HdovdError


@dataclass(frozen=True, slots=True)
class Nouns:
    """`vocabulary` in row order; `by_image` the rows that each image offers, or None: all, for every image."""

    vocabulary: tuple[str, ...]
    by_image: dict[int, tuple[int, ...]] | None

    def offered(self, image_id: int) -> tuple[int, ...]:
        if self.by_image is None:
            return tuple(range(len(self.vocabulary)))
        return self.by_image.get(image_id, ())


def read_vocabulary(path: Path, option: str = "--vocabulary") -> tuple[str, ...]:
    """One name a line; blank lines and lines that begin with # do not count. Raises HdovdError if none is left."""
    if not path.is_file():
        raise HdovdError(f"{option} {path}: no such file; expected one a line")
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise HdovdError(f"{option} {path} is no text file ({error}); expected one a line") from error
    names = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not names:
        raise HdovdError(f"{option} {path} holds nothing; expected one a line")
    return names


def read_nouns(vocabulary: Path, captions: Path | None) -> Nouns:
    """The nouns that images offer. Raises HdovdError if the captions hold no word of the vocabulary."""
    names = read_vocabulary(vocabulary)
    if captions is None:
        return Nouns(names, None)
    tree = read_json(captions, "captions")
    if not isinstance(tree, dict) or not isinstance(tree.get("annotations"), list):
        raise HdovdError(f"{captions} is no COCO captions file: it needs annotations of {{image_id, caption}}")
    rows = {words(name): row for row, name in enumerate(names)}
    longest = max(map(len, rows))
    found: dict[int, set[int]] = {}
    for number, entry in enumerate(tree["annotations"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int) or not isinstance(entry.get("caption"), str):
            raise HdovdError(f"{captions}: entry {number} of annotations is no {{image_id, caption}}: {str(entry)[:80]}")
        found.setdefault(entry["image_id"], set()).update(_matches(words(entry["caption"]), rows, longest))
    if not any(found.values()):
        raise HdovdError(f"no caption of {captions} holds a word of {vocabulary} ({len(names)} names): are they of one language?")
    return Nouns(names, {image_id: tuple(sorted(words)) for image_id, words in found.items()})


def words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without punctuation."""
    return tuple(re.findall(r"\w+", text.lower()))


def _matches(caption: tuple[str, ...], rows: dict[tuple[str, ...], int], longest: int) -> list[int]:
    """Rows of the names that stand in a caption; at every place the longest one, which takes its words."""
    found, at = [], 0
    while at < len(caption):
        for length in range(min(longest, len(caption) - at), 0, -1):
            row = rows.get(caption[at : at + length])
            if row is not None:
                found.append(row)
                break
        else:
            length = 1
        at += length
    return found


def named_novel(vocabulary: Sequence[str], novel: Sequence[str]) -> list[str]:
    """The novel class names that a vocabulary holds: allowed, since captions hold them, but reported."""
    have = {words(name) for name in vocabulary}
    return [name for name in novel if words(name) in have]
