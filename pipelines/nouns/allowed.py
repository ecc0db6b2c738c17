"""Which nouns may name an image's pseudo boxes (METHOD section 2), and how captions are searched for them.

Without captions: the whole vocabulary, the same for every image. With captions, or a file of `hdovd nouns`: the
vocabulary's names that the image's own captions hold, at every place the longest, whose words may be in the plural.
That needs no parser, finds nothing but names of the vocabulary, and cannot tell "a watch" from "they watch"; `find`
with a parser matches first as well.

Singulars are from simplemma's dictionary of English, asked for plurals alone: it knows no parts of speech, and would
make "paint" of a painting. What it has otherwise than nouns need it stands in `names/singular.txt`.

COCO captions are read one at a time, `{"images": [...], "annotations": [{"image_id": 1, "caption": "A dog."}]}`: the
file of COCO's training images holds 591,753. The file of nouns by image is written by `find`:

    {"format": "hdovd nouns", "version": 1, "made_by": {...}, "vocabulary": ["cat", "hot dog"], "images": {"139": [0,
    1]}, ...}

`images`: for each image id the rows of `vocabulary` that its captions hold, in ascending order. `unmatched`: words of
the captions that the vocabulary lacks, with the number of captions.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import simplemma

from hdovd.core import HdovdError
from hdovd.core.text_files import JsonStream, checked_name, cut, read_json, shown
from hdovd.data.coco import whole
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.name_list import read_vocabulary, shipped

_WORD = re.compile(r"[^\W_]+")
_POSSESSIVE = re.compile("(?<=\\w)['`\u2019\u00b4]s\\b")  # with the signs that people type for it


def noun_words(text: str) -> tuple[str, ...]:
    """The words of a text in lower case, without signs and the 's of a possessive: `dog-house` has two."""
    return tuple(_WORD.findall(_POSSESSIVE.sub("", text.lower())))


def singular_of(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(singular, words))


@cache
def singular(word: str) -> str:
    """The singular of a noun in lower case. Other words, and nouns that have none (scissors, glasses), stay as they
    are.
    """
    return _corrections().get(word) or _reduced(word)


def _reduced(word: str) -> str:
    """What dictionary and rules say, without the corrections."""
    if word.endswith("men") and simplemma.lemmatize(word, lang="en").endswith("man"):  # firemen, not specimen
        return word[:-2] + "an"
    if not word.endswith("s") or len(word) < 3:
        return word
    if simplemma.is_known(word, lang="en"):
        return simplemma.lemmatize(word, lang="en").lower()
    return _by_rule(word)


def _by_rule(word: str) -> str:
    """For words that no dictionary has: coatracks, tvs, corkboards."""
    if word.endswith(("ss", "us", "sis")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "xes", "zes", "ches", "shes", "oes")) else word[:-1]


@cache
def _corrections() -> dict[str, str]:
    return dict(line.split() for line in shipped("singular"))


MIN_JOINED = 3  # letters of each word that may join to a name written as one: "skate board", not "a corn"


class Match(NamedTuple):
    """The name `row` stands in words `start` to `stop`."""

    row: int
    start: int
    stop: int


class Found(NamedTuple):
    """What one caption holds: nouns, and words that are neither in the vocabulary nor too common to be missed there."""

    image_id: int
    nouns: list[str]
    unmatched: list[str]


class NameMatcher:
    """Finds the names of a vocabulary in the words of a text.

    Words are compared in the singular and joined, so that `hot dog` is in "hotdogs", and `skateboard` in "skate
    boards". A name that has no singular (scissors, glasses) is found as it is. Of two names that are the same then (hot
    dog, hotdog), the first one is found.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._sizes = [len(noun_words(name)) for name in names]
        self._longest = max(self._sizes, default=0) + 1
        whole = ["".join(noun_words(name)) for name in names]
        keys = ["".join(singular_of(noun_words(name))) for name in names]
        rows = range(len(names))[::-1]  # from the last: of names that are the same, the first is kept
        self._exact = {whole[row]: row for row in rows if whole[row]}
        # A name in the singular has its key before one in the plural.
        self._singular = {keys[row]: row for row in rows if keys[row]}
        self._singular |= {key: row for key, row in self._exact.items() if keys[row] == key}

    def find(self, words: Sequence[str]) -> list[Match]:
        """All matches, from left to right: at every place the longest name, which takes its words."""
        singulars, found, at = singular_of(words), list[Match](), 0
        while at < len(words):
            for stop in range(min(at + self._longest, len(words)), at, -1):
                row = self._row(words[at:stop], singulars[at:stop])
                if row is not None:
                    found.append(Match(row, at, stop))
                    at = stop
                    break
            else:
                at += 1
        return found

    def _row(self, words: Sequence[str], singulars: Sequence[str]) -> int | None:
        row = self._exact.get("".join(words), self._singular.get("".join(singulars)))
        if row is None and _corrections().get(words[-1]) == words[-1]:  # glasses and skis: what each of them is
            row = self._singular.get("".join((*singulars[:-1], _reduced(words[-1]))))
        if row is not None and len(words) > self._sizes[row] and min(map(len, words)) < MIN_JOINED:
            return None
        return row


class StopList:
    """Names that are no objects: those that ship, and a user's own, which alone overrule a vocabulary. Compared in the
    singular.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        self.names = tuple(dict.fromkeys((*shipped("stop"), *own)))
        self._keys = {singular_of(noun_words(name)) for name in self.names}
        self._own = {singular_of(noun_words(name)) for name in own}

    def __contains__(self, name: str) -> bool:
        return singular_of(noun_words(name)) in self._keys

    def overruled(self, vocabulary: Sequence[str]) -> list[str]:
        """The names of a vocabulary that the user's own list holds."""
        return [name for name in vocabulary if singular_of(noun_words(name)) in self._own]

    def ends(self, words: Sequence[str]) -> bool:
        """Whether these words are one of the list, or end with one: the front, the train front."""
        alike = singular_of(words)
        return any(alike[start:] in self._keys for start in range(len(alike)))


class MatchFinder:
    """The nouns of captions by matching alone. `stopped`: names of the vocabulary that the user's stop list holds; they
    are not offered.
    """

    def __init__(self, vocabulary: Sequence[str], stop: StopList) -> None:
        self.vocabulary = tuple(vocabulary)
        self.stopped = stop.overruled(vocabulary)
        self._matcher, self._stop = NameMatcher(vocabulary), stop

    def __call__(self, captions: Iterable[tuple[int, str]]) -> Iterator[Found]:
        for image_id, caption in captions:
            words = noun_words(caption)
            matches = self._matcher.find(words)
            names = [name for m in matches if (name := self.vocabulary[m.row]) not in self.stopped]
            yield Found(image_id, names, unmatched(words, matches, self._stop))


def unmatched(words: Sequence[str], matches: Sequence[Match], stop: StopList) -> list[str]:
    """The words between the matches, in the singular, that may be nouns for all that is known."""
    taken = {at for match in matches for at in range(match.start, match.stop)}
    return [
        singular(word)
        for at, word in enumerate(words)
        if at not in taken and _may_be_noun(word) and not stop.ends((word,))
    ]


@cache
def _common() -> frozenset[str]:
    return frozenset(shipped("common"))


@cache
def _may_be_noun(word: str) -> bool:
    return len(word) >= MIN_JOINED and word.isalpha() and word not in _common() and singular(word) not in _common()


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

    @classmethod
    def of(cls, vocabulary: tuple[str, ...], names: Mapping[int, Iterable[str]]) -> "Nouns":
        """By the names that each image offers."""
        row_of = {name: row for row, name in enumerate(vocabulary)}
        return cls(
            vocabulary, {image_id: tuple(sorted(map(row_of.__getitem__, own))) for image_id, own in names.items()}
        )

    def offered(self, image_id: int) -> tuple[int, ...]:
        if self.by_image is None:
            return tuple(range(len(self.vocabulary)))
        return self.by_image.get(image_id, ())


def offered_nouns(nouns: Path | None, vocabulary: Path | None, captions: Path | None) -> Nouns | None:
    """The nouns that images offer, by the files of an extraction; None if it names no pseudo boxes. Raises HdovdError
    for files that do not fit, and if the captions hold no word of the vocabulary.
    """
    if nouns is not None:
        return read_noun_file(nouns)
    if vocabulary is None:
        return None
    names = read_vocabulary(vocabulary)
    if captions is None:
        return Nouns(names, None)
    found = dict[int, set[str]]()
    for one in MatchFinder(names, StopList())(read_captions(captions, set())):
        found.setdefault(one.image_id, set()).update(one.nouns)
    if not any(found.values()):
        raise HdovdError(
            f"no caption of {captions} holds a word of {vocabulary} ({len(names)} names): are they of one language?"
        )
    return Nouns.of(names, found)


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
    # one image a line: for people, and for diff
    write_text(path, json.dumps(head)[:-1] + ',\n"images": {\n' + ",\n".join(lines) + "\n}}\n")


def read_noun_file(path: Path) -> Nouns:
    """Raises HdovdError if it is no such file, or a row is none of its vocabulary."""
    tree, where = read_json(path, "--nouns"), f"--nouns {path}"
    if not isinstance(tree, dict) or (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
        found = shown(tree.get("version") if isinstance(tree, dict) and tree.get("format") == FORMAT else tree)
        raise HdovdError(
            f'{where} is no file of nouns that this hdovd reads: expected {{"format": "{FORMAT}", "version": {VERSION}'
            f", ...}}, found {found}; make one with hdovd nouns"
        )
    vocabulary, images = tree.get("vocabulary"), tree.get("images")
    if not isinstance(vocabulary, list) or not vocabulary or not isinstance(images, dict):
        raise HdovdError(
            f"{where}: vocabulary must be a list of names, not {shown(vocabulary)}, and images rows by image id, not "
            f"{shown(images)}"
        )
    for row, name in enumerate(vocabulary):
        checked_name(name, f"{where}: vocabulary must be a list of names: number {row}")
    if len(set(vocabulary)) < len(vocabulary):
        raise HdovdError(f"{where}: vocabulary holds a name twice")
    by_image: dict[int, tuple[int, ...]] = {}
    for image_id, rows in images.items():
        known = isinstance(rows, list) and all(type(row) is int and 0 <= row < len(vocabulary) for row in rows)
        if not known or not re.fullmatch("-?[0-9]{1,18}", image_id):
            raise HdovdError(
                f"{where}: image {cut(image_id)} has {cut(str(rows), 80)}, expected an image id, and rows of the "
                f"vocabulary, 0 to {len(vocabulary) - 1}"
            )
        by_image[int(image_id)] = tuple(sorted(set(rows)))
    if not any(by_image.values()):
        raise HdovdError(f"{where} holds no image with a noun; make it again with hdovd nouns")
    return Nouns(tuple(vocabulary), by_image)
