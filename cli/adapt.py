"""`hdovd adapt`."""

from hdovd.cli.command import command
from hdovd.pipelines.adaptation.config import AdaptConfig


@command
def adapt(config: AdaptConfig) -> None:
    """Classes that RUN knows are kept: docs/ADAPT.md says how. Several GPUs and --resume as for hdovd train. Next:
    hdovd eval OUT --before RUN, hdovd detect OUT.
    """
    from hdovd.pipelines.adaptation.adapt import adapt as run

    run(config)
