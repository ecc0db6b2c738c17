"""`hdovd nouns`."""

from shlex import quote

import typer

from hdovd.cli.command import command
from hdovd.pipelines.nouns.config import NounsConfig


@command
def nouns(config: NounsConfig) -> None:
    """Says how many there are, which words of the captions the vocabulary lacks, and which novel names it holds and how
    often. See docs/NOUNS.md. Next: hdovd extract-clip --nouns OUT.
    """
    from hdovd.pipelines.nouns.find import find_nouns

    find_nouns(config)
    typer.echo(f"next: hdovd extract-clip --nouns {quote(str(config.out))} --proposals FILE ...")
