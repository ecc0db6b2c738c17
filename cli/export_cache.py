"""`hdovd cache export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET, TAR_SAMPLES
from hdovd.cli import options


class ExportForm(StrEnum):
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


def export(
    cache: Annotated[str, typer.Argument(help="The cache: a folder, or s3://, gs://.")],
    to: Annotated[ExportForm, typer.Option("--to", help="The form: tar shards that the webdataset package reads, or a Parquet file.")],
    out: Annotated[str, typer.Option("--out", help="The folder to write, or s3://, gs://; for parquet a file, FILE.parquet.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="The base/novel split; by default that of the extraction.")] = None,
    features: options.Features = DEFAULT_SET,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Images a tar shard; it is held in memory while it is made.")
    ] = TAR_SAMPLES,
) -> None:
    """Write a set of features in a form that other programs read.

    webdataset: pictures, base annotations, boxes and embeddings of each image together, in tar shards to train from as a
    stream. Killed? The same command goes on where it was. Next: hdovd train --cache OUT, which needs no other data.

    parquet: a row a box, with its image, class or noun, and embedding, for DuckDB, pandas and others that read tables.
    Needs pip install 'hdovd[parquet]'.

    The data are those of the extraction unless they are given.
    """
    from hdovd.data.coco import DataPaths

    where = DataPaths(data, images, annotations) if data or images or annotations else None
    if to is ExportForm.PARQUET:
        from hdovd.pipelines.cache_tools.config import ParquetConfig
        from hdovd.pipelines.extraction.source import CacheSource

        table = ParquetConfig(CacheSource(cache, features, where, protocol), Path(out))
        table.check()  # before torch: a mistake shows at once
        from hdovd.pipelines.cache_tools.parquet import export_parquet

        export_parquet(table, typer.echo)
        return
    from hdovd.pipelines.extraction.tar_config import TarExportConfig

    shards = TarExportConfig(cache, out, where, protocol, features, samples)
    shards.check()
    from hdovd.pipelines.extraction.tar_export import export_tars

    export_tars(shards)
    typer.echo(f"next: hdovd train --cache {quote(str(out))} --out RUN ...")
