"""`hdovd bench`: what an extraction will cost on your machine."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli.lazy import new_app
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.options import number_or_auto
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Batch = Annotated[
    str,
    typer.Option(
        "--batch",
        "--batch-size",
        help="Crops that CLIP embeds at a time (or the pixels of so many), or auto: found by trying.",
    ),
]
Workers = Annotated[
    str, typer.Option("--workers", help="Processes that decode and crop, or auto: none on a CPU, up to 16 for a GPU.")
]
Compute = Annotated[
    Precision,
    typer.Option("--precision", help="What CLIP computes in; auto: what suits the device (docs/MACHINES.md)."),
]


app = new_app(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure on this machine, on made-up data."""


@app.command()
def extract(
    clip: Annotated[
        str, typer.Option("--clip", help="open_clip model name, local-dir:PATH or hf-hub:NAME.")
    ] = "ViT-B-32",
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="Tag or checkpoint file. Default: random weights.")
    ] = None,
    precision: Compute = Precision.AUTO,
    device: Device = "auto",
    workers: Workers = "auto",
    batch: Batch = "auto",
    crop: Annotated[Shape, typer.Option(help="The pixels that a box stands for.")] = Shape.BOX,
    crop_scales: Annotated[str, typer.Option("--crop-scales", help="As for extract-clip.")] = "1",
    images: Annotated[
        int | None, typer.Option(min=1, help="Images a round. Default: what the model does in ten seconds.")
    ] = None,
    boxes: Annotated[int, typer.Option(min=2, help="Boxes an image.")] = 30,
    picture: Annotated[str, typer.Option("--picture", help="Size of the JPEG files, WIDTHxHEIGHT.")] = "640x480",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the bare model and of all; medians are printed.")] = 3,
    forecast: Annotated[
        str,
        typer.Option(
            "--forecast", help="IMAGES,BOXES of the data set to forecast. Default: COCO, 30 proposals an image."
        ),
    ] = "118287,4400000",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where to work: a new folder in this one. Default: the system's for temporary files."
        ),
    ] = None,
) -> None:
    """Measure the extraction beside the bare model, stage by stage, and forecast what a data set costs."""
    size, data_set = _two(picture, "x", "--picture"), _two(forecast, ",", "--forecast")
    recipe, processes, batch_size = (
        CropRecipe.parse(crop, crop_scales),
        number_or_auto("--workers", 0, workers),
        number_or_auto("--batch", 1, batch),
    )
    from hdovd.pipelines.forecast import extraction

    with tempfile.TemporaryDirectory(prefix="hdovd-bench-", dir=folder) as place:
        found = extraction.forecast(
            extraction.ForecastConfig(
                folder=Path(place),
                clip=clip,
                pretrained=pretrained,
                precision=precision,
                device=device,
                workers=processes,
                batch_size=batch_size,
                crop=recipe,
                images=images,
                boxes=boxes,
                picture=size,
                rounds=rounds,
                data_set=data_set,
            )
        )
    for line in found.lines():
        typer.echo(line)
    if json_file is not None:
        write_text(json_file, json.dumps(found.tree(), indent=1))


def _two(text: str, mark: str, option: str) -> tuple[int, int]:
    """Two whole numbers with a mark between them. Raises HdovdError for anything else."""
    first, _, second = text.partition(mark)
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise HdovdError(f"{option} {text}: expected two whole numbers above 0 with {mark!r} between them")
    return int(first), int(second)
