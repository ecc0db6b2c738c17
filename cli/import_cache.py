"""`hdovd cache import`."""

from shlex import quote

import typer

from hdovd.cli.command import command
from hdovd.pipelines.cache_tools.import_config import ForeignFormat, ImportConfig


@command
def import_(config: ImportConfig) -> None:
    """Turn embeddings that others published into a cache. Its identity says "imported, origin unknown".

    Files are read without running code in them: .pth as weights only, .pkl as arrays and lists alone.
    --format webdataset: tar shards become the cache again that they were exported from; no other option is read.
    """
    if config.format is ForeignFormat.WEBDATASET:
        from hdovd.pipelines.extraction.tar_export import import_tars

        import_tars(config.url, config.cache)
    else:
        from hdovd.pipelines.cache_tools.importing import import_features

        import_features(config)
    typer.echo(f"next: hdovd cache info {quote(str(config.cache))}")
