"""The words of a text, and the singular of a noun.

simplemma's dictionary of English, asked for plurals alone: it knows no parts of speech, and would make "paint" of a
painting. What it has otherwise than nouns need it stands in `names/singular.txt`.
"""

import re
from collections.abc import Sequence
from functools import cache

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
    if word.endswith(("sses", "xes", "zes", "ches", "shes", "oes")):
        return word[:-2]
    return word[:-1]


@cache
def _corrections() -> dict[str, str]:
    return dict(line.split() for line in shipped("singular"))
