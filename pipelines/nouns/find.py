"""The nouns of each image from its COCO captions, as a file that extraction takes.

`matching` and `parsing` find them, `file` writes them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from hdovd.cache.identity import hash_file
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.core.version import __version__
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.name_list import GENERAL, read_vocabulary
from hdovd.pipelines.nouns.allowed import Captions, Nouns, named_novel, write_noun_file
from hdovd.pipelines.nouns.config import SPACY_MODEL, NounsConfig, Parser
from hdovd.pipelines.nouns.matching import Found, MatchFinder, StopList
from hdovd.pipelines.nouns.parsing import ParsingFinder, load_parser, why_not

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
    captions = Captions(job.captions)
    with progress(finder(captions), "nouns", "caption") as bar:
        report = _collect(bar, captions, finder.vocabulary)
    if not any(report.images_of.values()):
        raise HdovdError(
            f"{job.captions}: {report.captions} captions, and none holds a noun"
            + ("" if finder.vocabulary is None else f" of the vocabulary ({len(finder.vocabulary)} names)")
            + ": are they of one language? The nouns are looked for in English"
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
    for line in report_lines(job, report, len(protocol.novel)):
        log(line)
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
    model = "_".join(str(pipeline.meta.get(key, "")) for key in ("lang", "name"))
    return ParsingFinder(pipeline, job.spacy_model, given, stop), {
        "name": str(parser),
        "spacy": version("spacy"),
        "model": model,
        "model_version": str(pipeline.meta.get("version", "")),
        "simplemma": version("simplemma"),
    }


def _collect(found: Iterable[Found], captions: Captions, vocabulary: tuple[str, ...] | None) -> NounsReport:
    """Nouns by image. Without a vocabulary, it is what was found, sorted."""
    row_of = {name: row for row, name in enumerate(vocabulary or ())}
    rows: dict[int, set[int]] = {}
    unmatched, count = Counter[str](), 0
    for one in found:
        count += 1
        rows.setdefault(one.image_id, set()).update(row_of.setdefault(name, len(row_of)) for name in one.nouns)
        unmatched.update(set(one.unmatched))
    names = list(row_of)
    order = list(range(len(names))) if vocabulary is not None else sorted(range(len(names)), key=names.__getitem__)
    new = {row: place for place, row in enumerate(order)}
    by_image = {
        image_id: tuple(sorted(new[row] for row in rows.get(image_id, ()))) for image_id in sorted(captions.images)
    }
    nouns = Nouns(tuple(names[row] for row in order), by_image)
    images_of = Counter(nouns.vocabulary[row] for own in by_image.values() for row in own)
    return NounsReport(nouns, count, images_of, unmatched, images_without=sum(not own for own in by_image.values()))


def _images_with(novel: str, report: NounsReport) -> int:
    """Images that offer a name that is this novel one, in whatever number it stands in the vocabulary."""
    assert report.nouns.by_image is not None
    rows = {row for row, name in enumerate(report.nouns.vocabulary) if named_novel((name,), (novel,))}
    return sum(not rows.isdisjoint(own) for own in report.nouns.by_image.values())


def report_lines(job: NounsConfig, report: NounsReport, novel: int) -> list[str]:
    assert report.nouns.by_image is not None
    images = len(report.nouns.by_image)
    each = sum(report.images_of.values()) / images
    lines = [
        f"{job.out}: {report.captions:,d} captions of {images:,d} images; {each:.2f} nouns an image, "
        f"{report.images_without:,d} images without one; {len(report.images_of):,d} of "
        f"{len(report.nouns.vocabulary):,d} names occur",
        "in most images: " + _listed(_most(report.images_of, SHOWN)),
    ]
    if report.unmatched:
        lines.append(
            f"most frequent words that the vocabulary lacks, nouns or not, in captions: "
            f"{_listed(_most(report.unmatched, SHOWN))} (more in the file; a longer --vocabulary finds them)"
        )
    if report.novel:
        lines.append(
            f"note: the vocabulary holds {len(report.novel)} of the {novel} novel names, in images: "
            f"{_listed(sorted(report.novel.items(), key=lambda item: -item[1]))}; allowed, since captions hold them, "
            f"and to be reported with results"
        )
    else:
        lines.append(f"the vocabulary holds none of the {novel} novel names of --protocol {job.protocol}")
    return lines


def _most(counts: Counter[str], count: int) -> list[tuple[str, int]]:
    """The most frequent, those that are alike in that by name: the order of the captions has no say."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,d}" for name, count in counts)


def _hash(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
