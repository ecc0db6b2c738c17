"""`hdovd extract-clip`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.pipelines.extract_config import DEFAULT_TEMPLATES, Activation, ExtractConfig, Precision


def extract_clip(
    cache: Annotated[Path, typer.Option("--cache", help="The cache folder to write (Zarr v3).")],
    clip: Annotated[str, typer.Option("--clip", help="open_clip model name, local-dir:PATH or hf-hub:NAME.")],
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with a model name.")] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    proposals: Annotated[Path | None, typer.Option("--proposals", help="COCO results JSON: [{image_id, bbox, score}].")] = None,
    vocabulary: Annotated[Path | None, typer.Option("--vocabulary", help="Nouns for pseudo boxes, one name a line.")] = None,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="COCO captions JSON: an image offers only its own captions' words.")
    ] = None,
    protocol: options.Protocol = "ov-coco",
    templates: Annotated[Path | None, typer.Option("--templates", help="Prompt templates, one a line, with {} for the name.")] = None,
    device: options.Device = "auto",
    precision: Annotated[Precision, typer.Option(help="Compute precision; embeddings are stored as float16.")] = Precision.FP32,
    activation: Annotated[Activation, typer.Option(help="The activation that the weights were trained with.")] = Activation.AUTO,
    batch_size: Annotated[int, typer.Option(min=1, help="Crops a CLIP batch.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode and crop.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the levels of a cache that differ.")] = False,
) -> None:
    """Run the frozen CLIP once and fill the cache: class names, nouns, images, base boxes and proposals.

    Needs no GPU, but wants one. Next: hdovd train --cache CACHE.
    """
    from hdovd.coco import DataPaths
    from hdovd.pipelines.extract_clip import extract_clip as run
    from hdovd.pipelines.nouns import read_vocabulary

    lines = DEFAULT_TEMPLATES if templates is None else read_vocabulary(templates, "--templates")
    run(ExtractConfig(DataPaths(data, images, annotations), cache, clip, pretrained, proposals, vocabulary, captions, protocol,
                      tuple(lines), device, precision, activation, batch_size, workers, overwrite))
    typer.echo(f"next: hdovd train --cache {cache} --out RUN ...")
