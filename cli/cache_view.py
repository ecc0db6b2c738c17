"""`hdovd cache view`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.cache_tools.config import ViewConfig


@command
def view(config: ViewConfig) -> None:
    """Show what the cache knows of an image: a picture of its boxes with a legend beside them, and the same as a table.

    Of each box: its class or noun, the cosine, the weight of its label in training, and the class names that it is most like.
    Weights are those of --calibration or --recipe, or those known for the cache's CLIP. CLIP is not needed. The cache
    knows where its data are; --data and --protocol say it anew.
    """
    from hdovd.pipelines.cache_tools.view_images import view_images

    view_images(config, typer.echo)
