"""`hdovd search`."""

import json
from dataclasses import asdict

import typer

from hdovd.cli.command import command
from hdovd.pipelines.search.config import BoxSource, SearchConfig


@command
def search(config: SearchConfig) -> None:
    """Several parts of a query add up, each with its weight: hdovd search CACHE "umbrella" "red=0.5" --not "rain".
    Words and pictures are embedded by the set's own CLIP; --like and --embeddings need none. Every box is compared,
    unless --index is given. The data are those of the extraction unless they are given. See docs/SEARCH.md.
    """
    from hdovd.pipelines.search.search import search as run, search_lines

    hits = run(config)
    if any(hit.source == BoxSource.BASE and not hit.name for hit in hits):
        typer.echo("note: base boxes are without names, which the annotations alone have: --data reads them", err=True)
    typer.echo(
        json.dumps([asdict(hit) for hit in hits], indent=1) if config.json_ else "\n".join(search_lines(hits, config))
    )
