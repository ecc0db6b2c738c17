"""`hdovd report`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders that hdovd train wrote; several are set side by side.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the page, index.html.")] = Path("report"),
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    gallery: Annotated[int, typer.Option(min=0, help="How many validation images are shown, novel objects first.")] = 36,
    pseudo: Annotated[int, typer.Option(min=0, help="How many training images are shown with their pseudo boxes.")] = 12,
    relations: Annotated[int, typer.Option(min=0, help="Training images in the batch of the relation matrices; 0 leaves them out.")] = 8,
    threshold: Annotated[float, typer.Option(help="Detections of this score or more are shown, and count in the confusion.")] = 0.3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch, for runs that have to be evaluated first.")] = 16,
    workers: Annotated[str, typer.Option(help="Processes that decode images for that, or auto.")] = "auto",
    device: options.Device = "auto",
    trust: options.Trust = False,
) -> None:
    """AP by run and class, precision and recall, errors by kind, confusion, reliability of scores, losses by level, validation images with
    truth and detections, pseudo boxes with their nouns and weights, relations of teacher and student, time and identity.
    The pictures are taken from --data; --images and --annotations name other validation images. Without any, from where the
    runs' cache was made.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.report.config import ReportConfig

    validation = DataPaths(data, images, annotations) if images or annotations else None
    job = ReportConfig(tuple(runs), out, DataPaths(data), validation, gallery, pseudo, relations, threshold, device, batch_size,
                  options.workers(workers), trust)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.report.report import report as run

    run(job, typer.echo)
