"""`hdovd detect`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.pipelines.runs.weights import Weights


def detect(
    run: Annotated[Path, typer.Argument(help="The run folder that hdovd train wrote.")],
    images: Annotated[
        list[str], typer.Argument(help="Files; folders, with their folders; quoted patterns such as 'photos/**/*.jpg'; or - for standard "
                                  "input: paths, one a line, or the bytes of one picture.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: detections.json, images.json, pictures/.")],
    classes: Annotated[
        str | None, typer.Option("--classes", help='What to look for: "umbrella, red kite, dog", or @FILE with one name a line (@general: '
                                 "the 1,447 names that ship). Default: the classes of the run's protocol.")
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", help="What scores above it is written and drawn; hdovd eval goes down to "
                                             "the recipe's, mostly 0.05.")] = 0.3,
    class_embeddings: Annotated[
        Path | None, typer.Option("--class-embeddings", help="A row for each name, in order, of the run's CLIP, which is not needed then. "
                                  "One array in .npy, .safetensors, .pt.")
    ] = None,
    clip: Annotated[str | None, typer.Option("--clip", help="The run's CLIP, where it lies elsewhere than the run's cache says: as for "
                                             "extract-clip.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with --clip and a model name.")] = None,
    templates: Annotated[
        str | None, typer.Option("--templates", help="Other prompts than those of the run: photo, vild, clip80, or a file, one a line.")
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Of the last epoch, or of the one with the best validation AP50 of base classes.")
                       ] = Weights.LAST,
    split_blind: Annotated[
        bool, typer.Option("--split-blind", help="Score all names alike. Without it a name of a base class of the run, in capitals or not, "
                           "is scored as one, and any other name as novel: see docs/METHOD.md, section 7.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Let the names compete with each other alone. Without it the run's other base classes "
                           "compete too, so that a person is not called a dog where only dogs are asked for.")
    ] = False,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Draw nothing.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at a time.")] = 8,
    workers: Annotated[str, typer.Option(help="Processes that decode pictures, or auto: none on a CPU, up to 16 for a GPU.")] = "auto",
    device: options.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the detections that are in --out.")] = False,
    trust: options.Trust = False,
) -> None:
    """Names that are no classes of the run are embedded by the text tower of its CLIP, once: they are kept in ~/.cache/hdovd. What
    cannot be read is skipped and listed; the exit code is 1 if nothing could be read. See docs/DETECT.md.
    """
    from hdovd.pipelines.common.name_list import names_asked
    from hdovd.pipelines.detection.config import DetectConfig
    from hdovd.pipelines.teachers.prompts import read_templates

    names = None if classes is None else names_asked(classes, typer.echo)
    prompts = None if templates is None else read_templates(templates)
    job = DetectConfig(
        run, tuple(images), out, names, threshold, class_embeddings, clip, pretrained, prompts, weights, device, batch_size,
        options.workers(workers), not no_pictures, split_blind, overwrite, alone, trust)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.detection.detect import detect as run_detect
    from hdovd.pipelines.detection.detect import detect_lines

    result = run_detect(job, typer.echo)
    for line in detect_lines(result):
        typer.echo(line)
    for file in result.files:
        typer.echo(f"wrote {file}")
    if not result.tally.images:
        raise typer.Exit(1)
