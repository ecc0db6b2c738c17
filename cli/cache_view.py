"""`hdovd cache view`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.core.errors import HdovdError


def view(
    cache: Annotated[str, typer.Argument(help="The cache: a folder, or s3://, gs://.")],
    image: Annotated[list[str] | None, typer.Option("--image", metavar="ID", help="An image id, repeatable or with commas between; "
                                                    "random, random:5. Default: the first image that has boxes.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The PNG to write, or a folder for ID.png. Default: ID.png in this folder.")] = Path(),
    features: options.Features = DEFAULT_SET,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Default: the protocol that the cache was made with.")] = None,
    calibration: options.Calibration = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Take the weights of this recipe, shipped or a TOML file.")] = None,
    set_: options.Set = None,
    seed: Annotated[int, typer.Option("--seed", help="Which images random takes.")] = 0,
) -> None:
    """Show what the cache knows of an image: a picture of its boxes with a legend beside them, and the same as a table.

    Of each box: its class or noun, the cosine, the weight of its label in training, and the class names that it is most like.
    Weights are those of --calibration or --recipe, or those known for the cache's CLIP. CLIP is not needed. The cache
    knows where its data are; --data and --protocol say it anew.
    """
    if recipe is None and set_:
        raise HdovdError("--set lays values over a recipe: give --recipe too")
    from hdovd.config.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or []) if recipe is not None else None
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.cache_tools.config import ViewConfig
    from hdovd.pipelines.calibration.values import refuse_two_sources
    from hdovd.pipelines.extraction.source import CacheSource

    refuse_two_sources(set_ or [], calibration)
    where = DataPaths(data, images, annotations) if data or images or annotations else None
    asked = tuple(word.strip() for words in image or () for word in words.split(",") if word.strip())
    config = ViewConfig(CacheSource(cache, features, where, protocol), asked, out, calibration, loaded, seed)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.cache_tools.view_images import view_images

    view_images(config, typer.echo)
