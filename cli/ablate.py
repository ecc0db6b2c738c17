"""`hdovd ablate`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.cli.train import Preset


def ablate(
    cache: Annotated[str, typer.Option("--cache", help="The one cache, or tar shards, that all runs read.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of all runs, OUT/CELL/seedK, and of the tables.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE,VALUE]...", help="More of --grid, after it.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=VALUE,VALUE", help="What varies: loss.image.enabled=true,false. Repeatable; "
                                       "all combinations are run.")
    ] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    val_images: Annotated[Path | None, typer.Option("--val-images", help="Validation images, instead of those under --data.")] = None,
    val_annotations: Annotated[Path | None, typer.Option("--val-annotations", help="Their boxes, instead of those under --data.")] = None,
    recipe: options.RecipeName = "ov-coco-faster-rcnn-r50",
    preset: Annotated[Preset | None, typer.Option(help="Settings laid over the recipe, beneath --set and --grid.")] = None,
    set_: options.Set = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs a cell: train.seed 0, 1, ...")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time. Several GPUs are used in turn, one a run; CPU cores are shared.")] = 1,
    protocol: options.Protocol = "ov-coco",
    features: options.Features = DEFAULT_SET,
    calibration: options.Calibration = None,
    init: options.Init = None,
    device: options.Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, done and to do, and stop.")] = False,
) -> None:
    """--grid loss.instance.enabled=true,false loss.class.enabled=true,false are four cells. The same command skips what is done and
    goes on with what was stopped or failed; another config in a run's folder is an error. Ctrl-C, SIGTERM and SIGUSR1 let the runs
    save and end (exit code 130 or 75). Exit code 1 if a run failed. Runs are not validated between epochs. Look on: hdovd runs OUT.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.ablation.ablate import AblateConfig
    from hdovd.pipelines.ablation.ablate import ablate as run
    from hdovd.pipelines.ablation.table import markdown
    from hdovd.pipelines.common.signals import exit_code

    validation = DataPaths(data, val_images, val_annotations) if val_images or val_annotations else None
    config = AblateConfig(DataPaths(data, images, annotations), cache, out, (*(grid or ()), *(more or ())), recipe,
                          preset.value if preset else None, tuple(set_ or ()), seeds, jobs, validation, protocol, features, device, dry_run,
                          calibration, init)
    result = run(config, typer.echo)
    if dry_run:
        for name, standing in result.standing.items():
            typer.echo(f"{standing:16s}{out / name}")
        typer.echo(f"{len(result.standing) - result.left} of {len(result.standing)} runs done")
        return
    typer.echo(f"\n{markdown(result.table)}")
    for file in result.files:
        typer.echo(f"wrote {file}")
    if result.failed:
        typer.secho(f"{len(result.failed)} failed: {', '.join(result.failed)}; the same command tries them again", fg="red", err=True)
    if result.stopped:
        typer.echo(f"stopped, {result.left} of {len(result.standing)} runs are left: the same command goes on", err=True)
        raise typer.Exit(exit_code(result.stopped))
    if result.failed:
        raise typer.Exit(1)
