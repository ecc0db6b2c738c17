"""`hdovd cache import`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.teachers.activation import Activation


def import_(
    source: Annotated[str, typer.Argument(help="The folder to import; of tar shards also s3://, gs://.")],
    cache: Annotated[str, typer.Option("--cache", help="The cache to write or add to: a folder, or s3://, gs://.")],
    format: Annotated[str, typer.Option("--format", help="hd-ovd or oadp (embeddings that their authors published), or webdataset.")],
    proposals: Annotated[Path | None, typer.Option("--proposals", help="With hd-ovd: the .pkl of boxes that the files go with.")] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: options.Protocol = "ov-coco",
    clip: Annotated[str | None, typer.Option("--clip", help="The CLIP that the publishers used: embeds the class names.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with a model name.")] = None,
    templates: options.Templates = "photo",
    features: options.Features = DEFAULT_SET,
    device: options.Device = "auto",
    precision: options.Compute = Precision.AUTO,
    activation: Annotated[Activation, typer.Option(help="The activation that the weights were trained with.")] = Activation.AUTO,
) -> None:
    """Turn embeddings that others published into a cache. Its identity says "imported, origin unknown".

    Files are read without running code in them: .pth as weights only, .pkl as arrays and lists alone.
    --format webdataset: tar shards become the cache again that they were exported from; no other option is read.
    """
    if format == "webdataset":
        from hdovd.pipelines.extraction.tar_export import import_tars

        import_tars(source, cache)
        typer.echo(f"next: hdovd cache info {quote(str(cache))}")
        return
    from hdovd.core.errors import HdovdError
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.cache_tools.import_config import ForeignFormat, ImportConfig
    from hdovd.pipelines.teachers.prompts import read_templates

    if format not in set(ForeignFormat):
        raise HdovdError(f"--format {format}: expected one of {', '.join(ForeignFormat)}, webdataset")
    config = ImportConfig(ForeignFormat(format), Path(source), DataPaths(data, images, annotations), cache, proposals, protocol,
                                 clip, pretrained, read_templates(templates), features, device, precision, activation)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.cache_tools.importing import import_features

    import_features(config)
    typer.echo(f"next: hdovd cache info {quote(str(cache))}")
