"""`hdovd train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.config import PRESETS, load_recipe

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
    device: options.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
) -> None:
    """Train a detector from the cache; CLIP is not needed. --set overrides any value of the recipe.

    The three levels: --set loss.instance.enabled=false, loss.class.enabled=false, loss.image.enabled=false.
    CACHE may be s3:// or gs://. Next: hdovd eval OUT.
    """
    from hdovd.coco import DataPaths

    loaded = load_recipe(recipe, [*(PRESETS[preset.value] if preset else ()), *(set_ or [])])  # before torch: a mistake shows at once
    from hdovd.pipelines.train import TrainJob
    from hdovd.pipelines.train import train as run

    run(TrainJob(DataPaths(data, images, annotations), cache, out, loaded, protocol, device, overwrite, features))
    typer.echo(f"next: hdovd eval {out} ...")
