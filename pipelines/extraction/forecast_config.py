"""What `hdovd bench extract` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.options import Device, Group, Option, Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, Shape
from hdovd.pipelines.extraction.config import Batch, Workers


def _two(mark: str, option: str, text: str) -> tuple[int, int]:
    """Two whole numbers with a mark between them. Raises HdovdError for anything else."""
    first, _, second = text.partition(mark)
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise HdovdError(f"{option} {text}: expected two whole numbers above 0 with {mark!r} between them")
    return int(first), int(second)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastConfig:
    """`pretrained`: None for random weights, which are as fast as any. `data_set`: how many images and boxes the
    forecast is for. `folder`: where to work; an empty one when the stage is called.
    """

    clip: Annotated[str, Option("open_clip model name, local-dir:PATH or hf-hub:NAME.")] = "ViT-B-32"
    pretrained: Annotated[str | None, Option("Tag or checkpoint file. Default: random weights.")] = None
    precision: Annotated[
        Precision, Option("What CLIP computes in; auto: what suits the device (docs/MACHINES.md).")
    ] = Precision.AUTO
    device: Device = "auto"
    workers: Workers = None
    batch_size: Batch = None
    crop: Annotated[
        CropRecipe,
        Group(
            {
                "crop": (Shape, Shape.BOX, Option("The pixels that a box stands for.")),
                "crop_scales": (str, "1", Option("As for extract-clip.")),
            },
            lambda given: CropRecipe.parse(given["crop"], given["crop_scales"]),
        ),
    ] = PLAIN_BOX
    images: Annotated[int | None, Option("Images a round. Default: what the model does in ten seconds.", min=1)] = None
    boxes: Annotated[int, Option("Boxes an image.", min=2)] = 30
    picture: Annotated[
        tuple[int, int],
        Option("Size of the JPEG files, WIDTHxHEIGHT.", parse=partial(_two, "x", "--picture"), text="640x480"),
    ] = (640, 480)
    rounds: Annotated[int, Option("Rounds of the bare model and of all; medians are printed.", min=1)] = 3
    data_set: Annotated[
        tuple[int, int],
        Option(
            "IMAGES,BOXES of the data set to forecast. Default: COCO, 30 proposals an image.",
            flags=("--forecast",),
            parse=partial(_two, ",", "--forecast"),
            text="118287,4400000",
        ),
    ] = (118_287, 4_400_000)
    json_file: Annotated[Path | None, Option("Write the figures there too.", flags=("--json",))] = None
    folder: Annotated[
        Path | None, Option("Where to work: a new folder in this one. Default: the system's for temporary files.")
    ] = None
