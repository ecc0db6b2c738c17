"""`hdovd calibrate`."""

from hdovd.cli.command import command
from hdovd.pipelines.calibration.config import CalibrateConfig


@command
def calibrate(config: CalibrateConfig) -> None:
    """From base boxes and base names alone: the cosine of each box and its name against that of the best wrong name.
    CLIP is not needed. The cache knows where its data are; --data and --protocol say it anew. Next: hdovd train
    --calibration FILE.
    """
    from hdovd.pipelines.calibration.calibrate import calibrate as run

    run(config)
