"""`hdovd calibrate`."""

from hdovd.cli.command import command
from hdovd.pipelines.calibration.config import CalibrateConfig


@command
def calibrate(config: CalibrateConfig) -> None:
    """What to expect of a cache's pseudo labels before training, from base boxes and base names alone, and the weight
    that follows, which training takes by itself where METHOD has none for the CLIP. CLIP is not needed. The cache knows
    where its data and nouns are; --data and --protocol say it anew. For another cache made in the same way: hdovd train
    --calibration FILE.
    """
    from hdovd.pipelines.calibration.calibrate import calibrate as run

    run(config)
