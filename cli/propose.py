"""`hdovd propose`."""

from hdovd.cli.command import command
from hdovd.pipelines.proposals.config import ProposeConfig


@command
def propose(config: ProposeConfig) -> None:
    """The recipe gives backbone, input size, schedule and the section [proposals]. The same command goes on where a
    killed one was, and takes a network that is there already with the same settings. Several GPUs: torchrun
    --nproc-per-node 8 -m hdovd propose ... Side by side: hdovd propose --report --detector rpn --detector oln. Next:
    hdovd extract-clip --proposals OUT.
    """
    from hdovd.pipelines.proposals.networks import recall_report
    from hdovd.pipelines.proposals.propose import propose as run

    if config.report:
        recall_report(config)
    else:
        run(config)
