"""`hdovd cache map`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options
from hdovd.pipelines.cache_tools.config import Colour, MapConfig
from hdovd.pipelines.extraction.source import CacheSource


def map_(
    cache: Annotated[str, typer.Argument(help="The cache: a folder, or s3://, gs://.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write; a picture lies beside it, as .png.")] = Path("cache-map.html"),
    colour: Annotated[Colour, typer.Option("--colour", "--color", help="By name: class of a base box, noun of a proposal; or by one of "
                                             "them alone, the nearest class name, the source. The page can switch.")] = Colour.NAME,
    points: Annotated[int, typer.Option("--points", min=1, help="At most so many boxes, sampled.")] = 5_000,
    seed: Annotated[int, typer.Option("--seed", help="Which boxes, and how the projection begins.")] = 0,
    thumbnails: Annotated[int, typer.Option("--thumbnails", min=0, help="Embed the crops of so many points in the page (about 1.5 kB "
                                            "each).")] = 0,
    features: options.Features = DEFAULT_SET,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Default: the protocol that the cache was made with.")] = None,
) -> None:
    """Show instance embeddings as points: a page that needs no network, and a picture. Needs pip install 'hdovd[map]'.

    Projected by t-SNE: boxes that lie near each other look alike to CLIP. It prints how often a box is most like its own
    class's name, and how alike neighbours are. CLIP is not needed.
    """
    from hdovd.data.coco import DataPaths

    where = DataPaths(data, images, annotations) if data or images or annotations else None
    config = MapConfig(CacheSource(cache, features, where, protocol), out, points, colour, seed, thumbnails)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.cache_tools.cache_map import map_cache

    map_cache(config, typer.echo)
