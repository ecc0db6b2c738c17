"""`hdovd train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.config.backbone import PRESETS

Preset = StrEnum("Preset", {name.replace("-", "_").upper(): name for name in PRESETS})  # type: ignore[misc]


def train(
    cache: Annotated[
        str, typer.Option("--cache", help="The cache that extract-clip wrote; or tar shards, without --data: DIR, DIR/{000000..000009}.tar")
    ],
    out: Annotated[Path, typer.Option("--out", help="The run folder to write.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    recipe: options.RecipeName = "ov-coco-faster-rcnn-r50",
    preset: Annotated[Preset | None, typer.Option(help="Settings laid over the recipe; base-only turns all distillation off.")] = None,
    set_: options.Set = None,
    protocol: options.Protocol = "ov-coco",
    features: options.Features = DEFAULT_SET,
    calibration: options.Calibration = None,
    device: options.Device = "auto",
    init: options.Init = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", "--requeue-safe", help="Go on from the checkpoint in OUT, or begin if there is none: for jobs that "
                           "may be started again.")
    ] = False,
    save_minutes: Annotated[float, typer.Option("--save-minutes", min=0, help="Between two checkpoints within an epoch.")] = 10.0,
    val_every: Annotated[int, typer.Option("--val-every", min=0, help="Validate after so many epochs; 0: never.")] = 1,
    val_images: Annotated[Path | None, typer.Option("--val-images", help="Validation images, instead of DATA/val2017.")] = None,
    val_annotations: Annotated[
        Path | None, typer.Option("--val-annotations", help="Validation boxes, instead of DATA/annotations/instances_val2017.json.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard too.")] = False,
    no_checksums: Annotated[bool, typer.Option("--no-checksums", help="Do not read each part of the cache whole, once, to compare its "
                                               "checksum: for caches larger than memory, which hdovd cache verify has checked.")] = False,
) -> None:
    """The three levels: --set loss.instance.enabled=false, loss.class.enabled=false, loss.image.enabled=false.
    CACHE may be s3:// or gs://. Several GPUs: torchrun --nproc-per-node 8 -m hdovd train ...; train.batch_size is that of all
    of them. Ctrl-C, SIGTERM and SIGUSR1 save and end, with exit code 130 or 75 (torchrun has codes of its own); --resume goes on to the
    sample. Next: hdovd eval OUT.
    """
    from hdovd.config.recipe import load_recipe
    from hdovd.data.coco import DataPaths

    loaded = load_recipe(recipe, [*(PRESETS[preset.value] if preset else ()), *(set_ or [])])
    from hdovd.pipelines.calibration.values import refuse_two_sources
    from hdovd.pipelines.training.config import TrainConfig, validation_paths

    refuse_two_sources(set_ or [], calibration)
    validation = validation_paths(data, val_images, val_annotations) if val_every else None
    job = TrainConfig(DataPaths(data, images, annotations), cache, out, loaded, protocol, device, overwrite, features, resume, save_minutes,
                 validation, val_every, tensorboard, calibration, init, not no_checksums)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.training.train import train as run

    run(job)
