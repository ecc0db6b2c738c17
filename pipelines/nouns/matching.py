"""Nouns of captions by matching: at every place the longest name of a vocabulary, whose words may be in the plural.

Needs no parser, finds nothing but names of the vocabulary, and cannot tell "a watch" from "they watch". `find` with a
parser matches first as well.

Singulars are from simplemma's dictionary of English, asked for plurals alone: it knows no parts of speech, and would
make "paint" of a painting. What it has otherwise than nouns need it stands in `names/singular.txt`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import simplemma

from hdovd.pipelines.common.name_list import shipped

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
    known = _corrections().get(word)
    return _reduced(word) if known is None else known


@cache
def forms(word: str) -> tuple[str, ...]:
    """What a word of a caption may stand for, the likeliest first: its singular, and of glasses and skis what each of
    them is.
    """
    return tuple(dict.fromkeys((singular(word), _reduced(word)))) if has_no_singular(word) else (singular(word),)


def has_no_singular(word: str) -> bool:
    """Whether this is a noun that ends in s and stays as it is, such as scissors: what it would be in the singular
    means something else.
    """
    return _corrections().get(word) == word


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
        row = self._exact.get("".join(words))
        if row is None:
            row = self._singular.get("".join(singulars))
        if row is None and has_no_singular(words[-1]):
            head = "".join(singulars[:-1])
            row = next(
                (self._singular[head + last] for last in forms(words[-1]) if head + last in self._singular), None
            )
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
