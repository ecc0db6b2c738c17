"""`hdovd nouns`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.pipelines.nouns.config import SPACY_MODEL, NounsConfig, Parser


def nouns(
    captions: Annotated[Path, typer.Option("--captions", help="COCO captions JSON, such as captions_train2017.json.")],
    out: Annotated[Path, typer.Option("--out", help="The file of nouns by image to write: JSON.")],
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", help="Names to look for, one a line. Default: general, the object list that ships; with "
                                  "spaCy, every noun.")
    ] = None,
    parser: Annotated[
        Parser, typer.Option("--parser", help="match: the longest names of the vocabulary, in singular and plural. spacy: what spaCy "
                             "tags as nouns. auto: spacy if it is there with its model.")
    ] = Parser.AUTO,
    stop_list: Annotated[
        Path | None, typer.Option("--stop-list", help="Words that are no objects, one a line, beside those that ship (front, top, group).")
    ] = None,
    spacy_model: Annotated[str, typer.Option("--spacy-model", help="An installed spaCy model, or its folder.")] = SPACY_MODEL,
    protocol: options.Protocol = "ov-coco",
) -> None:
    """Says how many there are, which words of the captions the vocabulary lacks, and which novel names it holds and how often.
    See docs/NOUNS.md. Next: hdovd extract-clip --nouns OUT.
    """
    job = NounsConfig(captions, out, vocabulary, parser, stop_list, spacy_model, protocol)
    job.check()  # before spaCy: a mistake shows at once
    from hdovd.pipelines.nouns.find import find_nouns

    find_nouns(job, typer.echo)
    typer.echo(f"next: hdovd extract-clip --nouns {quote(str(out))} --proposals FILE ...")
