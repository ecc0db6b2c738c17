"""`hdovd extract-clip`."""

from shlex import quote

import typer

from hdovd.cache import DEFAULT_SET
from hdovd.cli.command import command
from hdovd.pipelines.extraction.config import ExtractConfig, this_share


@command
def extract_clip(config: ExtractConfig) -> None:
    """Prints first, level by level, whether the cache has it (hit), some of it (extend) or nothing (extract), and what
    that costs. Killed? The same command goes on where it was. Needs no GPU, but wants one. Next: hdovd train --cache
    CACHE.
    """
    from hdovd.pipelines.extraction.extract_clip import extract_clip as run

    report = run(config)
    if report.whole and not config.dry_run and this_share(None).speaks:
        named = "" if config.features == DEFAULT_SET else f" --features {config.features}"
        typer.echo(f"next: hdovd train --cache {quote(str(config.cache))}{named} --out RUN ...")
