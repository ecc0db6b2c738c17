"""The nouns of each image from its COCO captions, as a file that extraction takes: by matching alone, or by a parser.

The parser is spaCy and a model of the user's, which tell nouns from verbs and know words that no list has. spaCy comes
with `pip install 'hdovd[spacy]'`, a model with `python -m spacy download en_core_web_sm`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.cache import hash_file
from hdovd.core import HdovdError, __version__, log, shorten
from hdovd.data import load_protocol
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.name_list import GENERAL, read_vocabulary, shipped
from hdovd.pipelines.nouns.allowed import (
    Found,
    Match,
    MatchFinder,
    NameMatcher,
    Nouns,
    StopList,
    named_novel,
    noun_words,
    read_captions,
    singular,
    unmatched,
    write_noun_file,
)
from hdovd.pipelines.nouns.config import SPACY_MODEL, NounsConfig, Parser

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token

SHOWN = 20  # nouns and words of the report
UNMATCHED_KEPT = 200  # words of the file


@dataclass(slots=True)
class NounsReport:
    """What was found. `images_of`: in how many images each noun is; `novel`: the same for novel names of the
    vocabulary.
    """

    nouns: Nouns
    captions: int
    images_of: Counter[str] = field(default_factory=Counter)
    unmatched: Counter[str] = field(default_factory=Counter)
    novel: dict[str, int] = field(default_factory=dict)
    images_without: int = 0


def find_nouns(job: NounsConfig) -> NounsReport:
    """Find the nouns of `job.captions` and write `job.out`. Raises HdovdError for bad input, or if there is no noun at
    all.
    """
    job.check()
    protocol = load_protocol(job.protocol)
    stop = StopList(() if job.stop_list is None else read_vocabulary(job.stop_list, "--stop-list"))
    finder, made_with = _finder(job, stop)
    if finder.stopped:
        log(f"stopped: {shorten(list(finder.stopped))}: on your stop list, and offered to no image")
    if kept := [name for name in finder.vocabulary or () if name in stop and name not in finder.stopped]:
        log(
            f"note: the vocabulary holds {shorten(list(kept))}, which the stop list that ships calls no object; a "
            f"vocabulary has its way, --stop-list takes them out"
        )
    images = set[int]()
    found = progress(finder(read_captions(job.captions, images)), "nouns", "caption")
    report = _collect(found, images, finder.vocabulary)
    if not any(report.images_of.values()):
        raise HdovdError(
            f"{job.captions}: {report.captions} captions, and none holds a noun"
            + ("" if finder.vocabulary is None else f" of the vocabulary ({len(finder.vocabulary)} names)")
            + ": are they of one language? The nouns are looked for in English, and spaCy's pipeline needs a tagger"
        )
    vocabulary = report.nouns.vocabulary
    report.novel = {name: _images_with(name, report) for name in named_novel(vocabulary, protocol.novel)}
    source = (
        "all nouns of the captions"
        if finder.vocabulary is None
        else GENERAL
        if job.vocabulary is None
        else job.vocabulary.name
    )
    made_by = {
        "captions": {"file": job.captions.name, "sha256": hash_file(job.captions), "captions": report.captions},
        "parser": made_with,
        "vocabulary": {"source": source, "sha256": _hash(vocabulary)},
        "stop_list": {"names": len(stop.names), "sha256": _hash(stop.names)},
        "hdovd": __version__,
    }
    write_noun_file(job.out, report.nouns, made_by, dict(_most(report.unmatched, UNMATCHED_KEPT)))
    log(*report_lines(job, report, len(protocol.novel)))
    return report


def _finder(job: NounsConfig, stop: StopList) -> tuple[MatchFinder | ParsingFinder, dict[str, str]]:
    """What finds nouns, and its versions."""
    parser = job.parser
    if parser is Parser.AUTO:
        missing = why_not(job.spacy_model)
        if missing and job.spacy_model != SPACY_MODEL:  # it was asked for by name
            raise HdovdError(f"--spacy-model {job.spacy_model}: {missing}")
        parser = Parser.MATCH if missing else Parser.SPACY
        log(f"parser: {parser}" + (f" ({missing})" if missing else f" with {job.spacy_model}"))
    given = None if job.vocabulary is None else read_vocabulary(job.vocabulary)
    if parser is Parser.MATCH:
        return MatchFinder(read_vocabulary(Path(GENERAL)) if given is None else given, stop), {
            "name": str(parser),
            "simplemma": version("simplemma"),
        }
    pipeline = load_parser(job.spacy_model)
    return ParsingFinder(pipeline, given, stop), {
        "name": str(parser),
        "spacy": version("spacy"),
        "model": "_".join(str(pipeline.meta.get(key, "")) for key in ("lang", "name")),
        "model_version": str(pipeline.meta.get("version", "")),
        "simplemma": version("simplemma"),
    }


def _collect(found: Iterable[Found], images: set[int], vocabulary: tuple[str, ...] | None) -> NounsReport:
    """Nouns by image, of those in `images` when all is found. Without a vocabulary, it is what was found, sorted."""
    names, lacking, count = dict[int, set[str]](), Counter[str](), 0
    for one in found:
        count += 1
        names.setdefault(one.image_id, set()).update(one.nouns)
        lacking.update(set(one.unmatched))
    names = {image_id: names.get(image_id, set()) for image_id in sorted(images)}
    known = tuple(sorted(set().union(*names.values()))) if vocabulary is None else vocabulary
    images_of, without = Counter(chain.from_iterable(names.values())), sum(not own for own in names.values())
    return NounsReport(Nouns.of(known, names), count, images_of, lacking, images_without=without)


def _images_with(novel: str, report: NounsReport) -> int:
    """Images that offer a name that is this novel one, in whatever number it stands in the vocabulary."""
    rows = {row for row, name in enumerate(report.nouns.vocabulary) if named_novel((name,), (novel,))}
    return sum(not rows.isdisjoint(own) for own in (report.nouns.by_image or {}).values())


def report_lines(job: NounsConfig, report: NounsReport, novel: int) -> list[str]:
    images = len(report.nouns.by_image or ())
    lines = [
        f"{job.out}: {report.captions:,d} captions of {images:,d} images; "
        f"{sum(report.images_of.values()) / images:.2f} nouns an image, {report.images_without:,d} images without one; "
        f"{len(report.images_of):,d} of {len(report.nouns.vocabulary):,d} names occur",
        "in most images: " + _listed(_most(report.images_of, SHOWN)),
    ]
    if report.unmatched:
        lines.append(
            f"most frequent words that the vocabulary lacks, nouns or not, in captions: "
            f"{_listed(_most(report.unmatched, SHOWN))} (more in the file; a longer --vocabulary finds them)"
        )
    if not report.novel:
        return [*lines, f"the vocabulary holds none of the {novel} novel names of --protocol {job.protocol}"]
    return [
        *lines,
        f"note: the vocabulary holds {len(report.novel)} of the {novel} novel names, in images: "
        f"{_listed(sorted(report.novel.items(), key=lambda item: -item[1]))}; allowed, since captions hold them, "
        f"and to be reported with results",
    ]


def _most(counts: Counter[str], count: int) -> list[tuple[str, int]]:
    """The most frequent, those that are alike in that by name: the order of the captions has no say."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,d}" for name, count in counts)


def _hash(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


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

    def __init__(self, pipeline: Language, vocabulary: Sequence[str] | None, stop: StopList) -> None:
        self.pipeline, self._stop = pipeline, stop
        self.vocabulary = None if vocabulary is None else tuple(vocabulary)
        self._names = tuple(shipped(GENERAL) if vocabulary is None else vocabulary)
        self.stopped = stop.overruled(self._names)
        self._matcher = NameMatcher(self._names)

    def __call__(self, captions: Iterable[tuple[int, str]]) -> Iterator[Found]:
        texts = ((caption, image_id) for image_id, caption in captions)
        for doc, image_id in self.pipeline.pipe(texts, as_tuples=True, batch_size=BATCH):
            yield self.nouns(doc, image_id)

    def nouns(self, doc: Doc, image_id: int) -> Found:
        """The nouns of one caption."""
        words = [word for token in doc for word in _words(token, doc.has_annotation("DEP"))]
        texts = [word.text for word in words]
        matches = [
            m
            for m in self._matcher.find(texts)
            if words[m.stop - 1].noun and (self.vocabulary is not None or _helps(words, m))
        ]
        names = [name for m in matches if (name := self._names[m.row]) not in self.stopped]
        if self.vocabulary is not None:
            nouns = {singular(word.text) for word in words if word.noun}
            return Found(image_id, names, [w for w in unmatched(texts, matches, self._stop) if w in nouns])
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
