"""`hdovd propose`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.pipelines.proposals.config import Detector


def propose(
    out: Annotated[
        Path | None, typer.Option("--out", help="The proposal file to write: COCO results JSON, or .npz. The network lies beside it.")
    ] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: options.Protocol = "ov-coco",
    recipe: options.RecipeName = "ov-coco-faster-rcnn-r50",
    set_: options.Set = None,
    detector: Annotated[
        list[Detector] | None, typer.Option("--detector", help="oln (the default): an object localisation network, which knows no "
                                            "background; rpn: a plain region proposal network, its baseline. Repeatable with --report.")
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option("--checkpoint", help="A network that propose trained, NAME.oln.safetensors: propose with it, train "
                                        "nothing. Repeatable with --report.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print the average recall on val2017 of these networks (trained where they are not there yet), "
                           "base and novel; no proposals are written.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Proposals an image, at most.")] = 10,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Largest IoU of a proposal with a base box or a better proposal.")
    ] = 0.5,
    min_side: Annotated[float, typer.Option(min=0, help="Shortest side of a proposal, pixels of the original image.")] = 8.0,
    backbone_out: Annotated[
        Path | None, typer.Option("--backbone-out", help="Also keep the trained backbone and its record: hdovd train can start from it.")
    ] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Lowest score of a proposal.")] = 0.0,
    device: options.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew, whatever network or checkpoint is there.")] = False,
    save_minutes: Annotated[float, typer.Option("--save-minutes", min=0, help="Between two checkpoints within an epoch.")] = 10.0,
    val_images: Annotated[Path | None, typer.Option("--val-images", help="For --report, instead of DATA/val2017.")] = None,
    val_annotations: Annotated[
        Path | None, typer.Option("--val-annotations", help="For --report, instead of DATA/annotations/instances_val2017.json.")
    ] = None,
) -> None:
    """The recipe gives backbone, input size, schedule and the section [proposals]. The same command goes on where a killed one was, and
    takes a network that is there already with the same settings. Several GPUs: torchrun --nproc-per-node 8 -m hdovd propose ...
    Side by side: hdovd propose --report --detector rpn --detector oln. Next: hdovd extract-clip --proposals OUT.
    """
    from hdovd.config.recipe import load_recipe
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.proposals.config import RecallConfig, propose_job

    loaded, paths = load_recipe(recipe, set_ or []), DataPaths(data, images, annotations)
    if report:
        from hdovd.pipelines.training.config import validation_paths

        recall = RecallConfig(paths, validation_paths(data, val_images, val_annotations), loaded, out, protocol,
                           tuple(detector or ()), tuple(checkpoint or ()), device, overwrite, save_minutes)
        recall.check()
        from hdovd.pipelines.proposals.recall import recall_report

        recall_report(recall)
        return
    job = propose_job(paths, out, loaded, tuple(detector or ()), tuple(checkpoint or ()), protocol=protocol, top=top, overlap=overlap,
                      min_side=min_side, min_score=min_score, device=device, backbone_out=backbone_out, overwrite=overwrite,
                      save_minutes=save_minutes)
    job.check()
    from hdovd.pipelines.proposals.propose import propose as run

    run(job)
