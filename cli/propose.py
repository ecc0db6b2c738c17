"""`hdovd propose`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options


def propose(
    out: Annotated[Path, typer.Option("--out", help="The proposal file to write: COCO results JSON, or .npz.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: options.Protocol = "ov-coco",
    recipe: options.RecipeName = "ov-coco-faster-rcnn-r50",
    set_: options.Set = None,
    top: Annotated[int, typer.Option(min=1, help="Proposals an image, at most.")] = 10,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Largest IoU of a proposal with a base box or a better proposal.")
    ] = 0.5,
    min_side: Annotated[float, typer.Option(min=0, help="Shortest side of a proposal, pixels of the original image.")] = 8.0,
    backbone_out: Annotated[
        Path | None, typer.Option("--backbone-out", help="Also keep the trained backbone: weights that hdovd train can start from.")
    ] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score of a proposal.")] = 0.0,
    device: options.Device = "auto",
) -> None:
    """Train a class-agnostic proposal network on base boxes, and write proposals for the training images.

    The recipe gives backbone, input size and schedule. Next: hdovd extract-clip --proposals OUT.
    """
    from hdovd.coco import DataPaths
    from hdovd.config import load_recipe

    loaded = load_recipe(recipe, set_ or [])  # before torch is imported: a mistake shows at once
    from hdovd.pipelines.propose import ProposeJob
    from hdovd.pipelines.propose import propose as run

    run(ProposeJob(DataPaths(data, images, annotations), out, loaded, protocol, top=top, overlap=overlap,
                   min_side=min_side, min_score=min_score, device=device, backbone_out=backbone_out))
    typer.echo(f"next: hdovd extract-clip --proposals {out} ...")
