"""Nouns by spaCy: real pipelines and Docs of its own, tagged by hand, since no trained model can be installed from a
package index.

spaCy is imported by the tests: every process of pytest-xdist reads this file, and one needs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hdovd.core import HdovdError
from hdovd.pipelines.nouns.allowed import StopList
from hdovd.pipelines.nouns.config import NounsConfig, Parser
from hdovd.pipelines.nouns.find import NounsReport, ParsingFinder, find_nouns, load_parser, why_not

if TYPE_CHECKING:
    from spacy import Language
    from spacy.tokens import Doc

TAGS = {
    "NN": "NOUN",
    "NNS": "NOUN",
    "NNP": "PROPN",
    "JJ": "ADJ",
    "VBZ": "VERB",
    "IN": "ADP",
    "DT": "DET",
    "POS": "PART",
    ".": "PUNCT",
}


@cache
def _english() -> Language:
    import spacy

    return spacy.blank("en")


def _doc(tagged: str, parsed: bool = True) -> Doc:
    """A Doc from "the/DT tennis/NN+ rackets/NNS": + marks a compound of the next word."""
    from spacy.tokens import Doc

    words, tags = zip(*(word.rsplit("/", 1) for word in tagged.split()), strict=True)
    plain = [tag.removesuffix("+") for tag in tags]
    deps = ["compound" if tag.endswith("+") else "dep" for tag in tags] if parsed else None
    heads = [at + tag.endswith("+") for at, tag in enumerate(tags)] if parsed else None
    return Doc(_english().vocab, list(words), tags=plain, pos=[TAGS[tag] for tag in plain], deps=deps, heads=heads)


def _nouns(
    tagged: str, vocabulary: Sequence[str] | None = None, parsed: bool = True, stop: tuple[str, ...] = ()
) -> list[str]:
    return ParsingFinder(_english(), vocabulary, StopList(stop)).nouns(_doc(tagged, parsed), 1).nouns


@pytest.mark.parametrize(
    ("tagged", "nouns"),
    [
        ("two/JJ tennis/NN+ rackets/NNS", ["tennis racket"]),
        ("a/DT beach/NN+ volleyball/NN+ players/NNS sits/VBZ", ["beach volleyball player"]),
        ("a/DT qwok/NN in/IN the/DT street/NN", ["qwok", "street"]),
        ("hot/JJ dogs/NNS and/IN dogs/NNS", ["hot dog", "dog"]),  # the adjective of a name that the general list has
        ("she/DT watches/VBZ a/DT watch/NN", ["watch"]),
        ("she/DT ties/VBZ a/DT rope/NN", ["rope"]),
        ("the/DT front/NN of/IN a/DT train/NN+ front/NN", ["train"]),
        ("a/DT beach/NN+ umbrella/NN and/IN an/DT umbrella/NN", ["beach umbrella", "umbrella"]),
        ("a/DT group/NN of/IN kids/NNS", ["kid"]),
        ("London/NNP and/IN a/DT Frisbee/NNP", ["frisbee"]),  # proper names are no nouns, but for those that a list has
        ("the/DT dog/NN 's/POS bed/NN", ["dog bed"]),
        ("the/DT scissors/NNS ./.", ["scissors"]),
    ],
    ids=lambda value: value[:25] if isinstance(value, str) else "",
)
def test_all_nouns(tagged: str, nouns: list[str]) -> None:
    assert _nouns(tagged) == nouns


def test_without_a_parser_nouns_in_a_row_are_one() -> None:
    assert _nouns("a/DT beach/NN volleyball/NN player/NN", parsed=False) == ["beach volleyball player"]


def test_with_a_vocabulary_its_names_and_no_others() -> None:
    vocabulary = ["racket", "watch", "orange", "hot dog"]
    tagged = "she/DT watches/VBZ hot/JJ dogs/NNS an/DT orange/JJ kite/NN"
    assert _nouns(tagged, vocabulary) == ["hot dog"]
    assert _nouns("tennis/NN+ rackets/NNS and/IN an/DT orange/NN", vocabulary) == ["racket", "orange"]


def test_a_users_stop_list() -> None:
    assert _nouns("a/DT qwok/NN and/IN a/DT dog/NN", stop=("qwok", "dog")) == []
    assert _nouns("a/DT qwok/NN and/IN a/DT dog/NN", ["dog"], stop=("dog",)) == []


def test_words_that_the_vocabulary_lacks_are_nouns() -> None:
    finder = ParsingFinder(_english(), ["dog"], StopList())
    assert finder.nouns(_doc("the/DT dog/NN jogs/VBZ near/IN kites/NNS"), 1).unmatched == ["kite"]


# --- whole runs, with a pipeline on disk ---


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pipeline that knows six words."""
    import spacy

    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    tags = {
        "tennis": ("NN", "compound"),
        "rackets": ("NNS", "pobj"),
        "qwok": ("NN", "dobj"),
        "dogs": ("NNS", "dep"),
        "watches": ("VBZ", "ROOT"),
        "front": ("NN", "dep"),
    }
    for word, (tag, dep) in tags.items():
        ruler.add([[{"LOWER": word}]], {"TAG": tag, "POS": TAGS[tag], "DEP": dep})
    pipeline.to_disk(tmp_path / "model")
    return tmp_path / "model"


def _run(
    tmp_path: Path, model: Path, vocabulary: Path | None = None, parser: Parser = Parser.SPACY
) -> tuple[NounsReport, dict[str, Any]]:
    captions = [(7, "Dogs and a qwok"), (7, "tennis rackets in front"), (3, "it watches dogs"), (3, "nothing")]
    (tmp_path / "captions.json").write_text(
        json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in captions]})
    )
    job = NounsConfig(
        captions=tmp_path / "captions.json",
        out=tmp_path / "nouns.json",
        vocabulary=vocabulary,
        parser=parser,
        spacy_model=str(model),
    )
    return find_nouns(job), json.loads((tmp_path / "nouns.json").read_text())


@pytest.mark.parametrize("parser", [Parser.SPACY, Parser.AUTO])
def test_all_nouns_of_a_file(tmp_path: Path, model: Path, parser: Parser) -> None:
    report, tree = _run(tmp_path, model, parser=parser)
    assert tree["vocabulary"] == ["dog", "qwok", "tennis racket"]
    assert tree["images"] == {"3": [0], "7": [0, 1, 2]}
    assert report.images_of == {"dog": 2, "qwok": 1, "tennis racket": 1}
    made = tree["made_by"]["parser"]
    assert (made["name"], made["spacy"], made["model"]) == ("spacy", version("spacy"), "en_pipeline")
    assert made["model_version"]


def test_names_of_a_vocabulary(tmp_path: Path, model: Path) -> None:
    (tmp_path / "words.txt").write_text("watch\nracket\ndog\n")
    _, tree = _run(tmp_path, model, tmp_path / "words.txt")
    assert tree["vocabulary"] == ["watch", "racket", "dog"]
    assert tree["images"] == {"3": [2], "7": [1, 2]}


def test_model_that_is_not_there_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"no model en_none_sm: python -m spacy download en_none_sm"):
        load_parser("en_none_sm")
    assert why_not("en_none_sm")


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"--spacy-model .*cannot be loaded"):
        load_parser(str(tmp_path))


def test_model_that_tags_nothing(tmp_path: Path) -> None:
    _english().to_disk(tmp_path / "blank")
    with pytest.raises(HdovdError, match=r"none holds a noun.*needs a tagger"):
        _run(tmp_path, tmp_path / "blank")
    assert not (tmp_path / "nouns.json").exists()
