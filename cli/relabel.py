"""`hdovd relabel`."""

from shlex import quote

import typer

from hdovd.cli.command import command
from hdovd.pipelines.extraction.config import this_share
from hdovd.pipelines.relabelling.config import RelabelConfig


@command
def relabel(config: RelabelConfig) -> None:
    """The run's detector looks for all nouns on the training images; what it finds besides base boxes are the new
    pseudo boxes, among them the likeliest for each noun that an image's captions hold, named by it and CLIP together.
    They become a new set of the cache that the run was trained from, which the next run trains from. No novel
    annotation is read: hdovd audit says so. Needs the CLIP, and wants a GPU. The same command goes on where a killed
    one was.
    """
    from hdovd.pipelines.relabelling.relabel import relabel as run

    report, name = run(config)
    if report.whole and this_share(None).speaks:
        typer.echo(f"next: hdovd train --cache {quote(str(config.cache))} --features {name} --out RUN ...")
