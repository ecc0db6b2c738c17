"""`hdovd cache export`."""

from __future__ import annotations

from enum import StrEnum
from shlex import quote
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options


class ExportForm(StrEnum):
    WEBDATASET = "webdataset"


def export(
    cache: Annotated[str, typer.Argument(help="The cache: a folder, or s3://, gs://.")],
    to: Annotated[ExportForm, typer.Option("--to", help="The form: tar shards that the webdataset package reads.")],
    out: Annotated[str, typer.Option("--out", help="The folder to write, or s3://, gs://.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="The base/novel split; by default that of the extraction.")] = None,
    features: options.Features = DEFAULT_SET,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images a shard; it is held in memory while it is made.")] = 1000,
) -> None:
    """Write pictures, base annotations, boxes and embeddings of each image together, in tar shards to train from as a stream.

    The data are those of the extraction unless they are given. Killed? The same command goes on where it was.
    Next: hdovd train --cache OUT, which needs no other data.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.extraction.tar_config import TarExportConfig

    given = DataPaths(data, images, annotations)
    config = TarExportConfig(cache, out, None if given == DataPaths() else given, protocol, features, samples)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.extraction.tar_export import export_tars

    export_tars(config)
    typer.echo(f"next: hdovd train --cache {quote(str(out))} --out RUN ...")
