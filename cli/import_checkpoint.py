"""`hdovd import-checkpoint`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class PublishedDetector(StrEnum):
    """Detectors that the authors published weights of."""

    FASTER_RCNN = "faster_rcnn"
    ADAMIXER = "adamixer"


def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors' code, .pth.")],
    out: Annotated[Path, typer.Option("--out", help="The run folder to write.")],
    detector: Annotated[PublishedDetector, typer.Option(help="Which detector the checkpoint is of.")],
    class_embeddings: Annotated[Path | None, typer.Option("--class-embeddings", help="Text embeddings of the classes, .pt: a row a class "
                                                          "in the protocol's order, 65 x 512 for ov-coco.")] = None,
    object_embedding: Annotated[Path | None, typer.Option("--object-embedding", help="adamixer: the text embedding of \"object\", .pt, "
                                                          "1 x 512.")] = None,
    protocol: Annotated[str, typer.Option(help="A shipped protocol, or a TOML file.")] = "ov-coco",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A value of the detector's recipe, KEY=VALUE. Repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
) -> None:
    """Every tensor of the file is used or named, and nothing of it is run: a file of anything but tensors is refused.
    """
    from hdovd.pipelines.runs.import_config import ImportCheckpointConfig

    job = ImportCheckpointConfig(file, out, detector.value, class_embeddings, object_embedding, protocol, tuple(settings or ()), overwrite)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.runs.import_checkpoint import import_checkpoint as run

    run(job, typer.echo)
