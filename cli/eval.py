"""`hdovd eval`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.evaluation.engines import Engine
from hdovd.pipelines.runs.weights import Weights


def eval(
    run: Annotated[Path, typer.Argument(help="The run folder that hdovd train wrote.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Default: the protocol that the run was trained with.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the table of all classes.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="Print what keeps AP50 from 100: errors by kind, novel and base apart "
                                         "(docs/ERRORS.md).")] = False,
    pictures: Annotated[int, typer.Option(min=0, help="Draw the detections of this many validation images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 16,
    workers: Annotated[str, typer.Option(help="Processes that decode images, or auto: none on a CPU, up to 16 for a GPU.")] = "auto",
    device: options.Device = "auto",
    engine: Annotated[Engine, typer.Option(help="What counts AP. faster-coco-eval gives the same sooner; it comes with hdovd's extra "
                                           "fast-eval.")] = Engine.PYCOCOTOOLS,
    weights: Annotated[Weights, typer.Option(help="Of the last epoch, or of the one with the best validation AP50 of base classes.")
                       ] = Weights.LAST,
    trust: options.Trust = False,
) -> None:
    """Writes metrics.json and detections.json (COCO results form) into RUN.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.evaluation.config import EvalConfig

    job = EvalConfig(run, DataPaths(data, images, annotations), protocol, device, batch_size, options.workers(workers), pictures,
                              engine, weights, trust)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.evaluation.evaluate import class_table, error_table, evaluate, result_table

    result = evaluate(job)
    typer.echo(result_table(result))
    if per_class:
        typer.echo(class_table(result))
    if errors:
        typer.echo(error_table(result.errors))
    for file in result.files:
        typer.echo(f"wrote {file}")
