"""What a search for nouns is asked to do. Imports neither simplemma nor spaCy, so that the command line can name it at
no cost.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, require_files
from hdovd.data import load_protocol
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.common.options import Option, Protocol

SPACY_MODEL = "en_core_web_sm"


class Parser(StrEnum):
    AUTO = "auto"
    MATCH = "match"
    SPACY = "spacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class NounsConfig:
    """A search for nouns. `protocol` says which names are novel: they are reported, nothing else."""

    captions: Annotated[Path, Option("COCO captions JSON, such as captions_train2017.json.")]
    out: Annotated[Path, Option("The file of nouns by image to write: JSON.")]
    vocabulary: Annotated[
        Path | None,
        Option("Names to look for, one a line. Default: general, the object list that ships; with spaCy, every noun."),
    ] = None
    parser: Annotated[
        Parser,
        Option(
            "match: the longest names of the vocabulary, in singular and plural. spacy: what spaCy tags as nouns. "
            "auto: spacy if it is there with its model."
        ),
    ] = Parser.AUTO
    stop_list: Annotated[
        Path | None, Option("Words that are no objects, one a line, beside those that ship (front, top, group).")
    ] = None
    spacy_model: Annotated[str, Option("An installed spaCy model, or its folder.")] = SPACY_MODEL
    protocol: Protocol = "ov-coco"

    def __post_init__(self) -> None:
        if self.out.is_dir():
            raise HdovdError(
                f"--out {self.out} is a folder: expected the file to write, such as {self.out / 'nouns.json'}"
            )
        if self.out.absolute() in {
            file.absolute() for file in (self.captions, self.vocabulary, self.stop_list) if file is not None
        }:
            raise HdovdError(f"--out {self.out} is one of the files that are read: name another")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        require_files(captions=self.captions)
        for option, file in (("--vocabulary", self.vocabulary), ("--stop-list", self.stop_list)):
            if file is not None:
                read_vocabulary(file, option)
