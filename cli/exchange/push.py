"""`hdovd push`."""

from hdovd.cli.command import command
from hdovd.pipelines.hub.config import PushConfig


@command
def push(config: PushConfig) -> None:
    """Runs become models, caches data sets. Every command that reads a run or a cache then takes hf://USER/NAME, or
    hf://USER/NAME@REVISION, pulls it once, and checks it. Needs pip install "hdovd[hub]", and hf auth login or
    HF_TOKEN.

    Of a run what is needed to use it is pushed: no checkpoint.pt, which is a pickle. A cache is checked first, as by
    hdovd cache verify. See docs/HUB.md.
    """
    from hdovd.pipelines.hub.push import push as run

    run(config)
