"""`hdovd calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options


def calibrate(
    cache: Annotated[str, typer.Option("--cache", help="The cache that extract-clip wrote.")],
    features: options.Features = DEFAULT_SET,
    out: Annotated[Path, typer.Option("--out", help="The file to write; a picture of the cosines lies beside it, as .png.")] = Path(
        "calibration.toml"),
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Default: the protocol that the cache was made with.")] = None,
) -> None:
    """From base boxes and base names alone: the cosine of each box and its name against that of the best wrong name. CLIP is not
    needed. The cache knows where its data are; --data and --protocol say it anew. Next: hdovd train --calibration FILE.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.calibration.config import CalibrateConfig

    where = DataPaths(data, images, annotations) if data or images or annotations else None
    config = CalibrateConfig(cache, out, features, where, protocol)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.calibration.calibrate import calibrate as run

    run(config, typer.echo)
