"""Nouns of captions by a parser: spaCy and a model of the user's, which tell nouns from verbs and know words that no
list has.

spaCy comes with `pip install 'hdovd[spacy]'`, a model with `python -m spacy download en_core_web_sm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.name_list import GENERAL, shipped
from hdovd.pipelines.nouns.matching import Found, Match, NameMatcher, StopList, noun_words, singular, unmatched

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token

BATCH = 256  # captions that spaCy gets at a time
NOUNS = ("NOUN", "PROPN")


def why_not(model: str) -> str | None:
    """What is missing for spaCy to parse with this model; None if nothing is."""
    if find_spec("spacy") is None:
        return "spaCy is not installed: pip install 'hdovd[spacy]'"
    import spacy.util

    if not spacy.util.is_package(model) and not Path(model).is_dir():
        return f"spaCy has no model {model}: python -m spacy download {model}, or name one with --spacy-model"
    return None


def load_parser(model: str) -> Language:
    """A spaCy pipeline by the name of an installed model, or a folder. Raises HdovdError if it is not there."""
    if (missing := why_not(model)) is not None:
        raise HdovdError(f"--parser spacy: {missing}")
    import spacy

    try:
        return spacy.load(model, exclude=["ner"])
    except (OSError, ValueError) as error:
        raise HdovdError(f"--spacy-model {model} cannot be loaded: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, slots=True)
class _Word:
    """A word of a caption. `compound`: belongs to the noun after it."""

    text: str
    noun: bool
    common: bool
    compound: bool
    plural: bool


class ParsingFinder:
    """The nouns of captions as spaCy tags them.

    With a vocabulary: its names, where the last word is a noun. Without: every common noun with the nouns that the
    parser calls its compound ("beach volleyball player"), in the singular. The general list helps with what a parser
    takes apart or calls a proper name: hot dogs, a Frisbee. Of a compound with a word of the stop list (a train front)
    the rest is left.
    """

    def __init__(self, pipeline: Language, model: str, vocabulary: Sequence[str] | None, stop: StopList) -> None:
        self.pipeline, self.model, self._stop = pipeline, model, stop
        self.vocabulary = None if vocabulary is None else tuple(vocabulary)
        self._names = tuple(shipped(GENERAL) if vocabulary is None else vocabulary)
        self.stopped = stop.overruled(self._names)
        self._matcher = NameMatcher(self._names)

    def __call__(self, captions: Iterable[tuple[int, str]]) -> Iterator[Found]:
        texts = ((caption, image_id) for image_id, caption in captions)
        tagged = False
        for doc, image_id in self.pipeline.pipe(texts, as_tuples=True, batch_size=BATCH):
            tagged = tagged or any(token.pos_ for token in doc)
            yield self.nouns(doc, image_id)
        if not tagged:
            raise HdovdError(
                f"--spacy-model {self.model} tags no part of speech in any caption: it takes a pipeline with a tagger, "
                "such as en_core_web_sm"
            )

    def nouns(self, doc: Doc, image_id: int) -> Found:
        """The nouns of one caption."""
        parsed = doc.has_annotation("DEP")
        words = [word for token in doc for word in _words(token, parsed)]
        texts = [word.text for word in words]
        matches = [
            m
            for m in self._matcher.find(texts)
            if words[m.stop - 1].noun and (self.vocabulary is not None or _helps(words, m))
        ]
        names = [name for m in matches if (name := self._names[m.row]) not in self.stopped]
        if self.vocabulary is not None:
            return Found(image_id, names, [w for w in unmatched(texts, matches, self._stop) if w in _nouns_of(words)])
        taken = {at for match in matches for at in range(match.start, match.stop)}
        return Found(image_id, names + self._others(words, taken), [])

    def _others(self, words: Sequence[_Word], taken: set[int]) -> list[str]:
        """Compounds and nouns that no match took, each to its last word."""
        found = []
        for at, word in enumerate(words):
            if at in taken or not word.common or (at + 1 not in taken and _goes_on(words, at)):
                continue
            start = at
            while start and start - 1 not in taken and words[start - 1].compound:
                start -= 1
            parts = [w.text for w in words[start:at]] + [singular(word.text) if word.plural else word.text]
            while parts and self._stop.ends(parts):
                parts.pop()
            if parts and len(parts[-1]) > 1 and any(map(str.isalpha, parts[-1])):
                found.append(" ".join(parts))
        return found


def _goes_on(words: Sequence[_Word], at: int) -> bool:
    """Whether this word belongs to the noun after it."""
    return words[at].compound and at + 1 < len(words) and words[at + 1].noun


def _helps(words: Sequence[_Word], match: Match) -> bool:
    """Whether a parser alone would miss this name of the general list."""
    return not _goes_on(words, match.stop - 1) and (match.stop - match.start > 1 or not words[match.start].common)


def _words(token: Token, parsed: bool) -> list[_Word]:
    """The words of a token; without a parser any noun right before a noun counts as its compound."""
    if token.tag_ == "POS":  # the 's of a possessive
        return []
    noun = token.pos_ in NOUNS
    compound = token.dep_ == "compound" if parsed else noun
    return [
        _Word(text, noun, token.pos_ == "NOUN", compound, token.tag_ in ("NNS", "")) for text in noun_words(token.text)
    ]


def _nouns_of(words: Sequence[_Word]) -> set[str]:
    return {singular(word.text) for word in words if word.noun}
