"""`hdovd propose`."""

from hdovd.cli.command import command
from hdovd.pipelines.proposals.config import ProposeOptions, RecallConfig


@command
def propose(config: ProposeOptions) -> None:
    """The recipe gives backbone, input size, schedule and the section [proposals]. The same command goes on where a
    killed one was, and takes a network that is there already with the same settings. Several GPUs: torchrun
    --nproc-per-node 8 -m hdovd propose ... Side by side: hdovd propose --report --detector rpn --detector oln. Next:
    hdovd extract-clip --proposals OUT.
    """
    asked = config.config()
    asked.check()
    if isinstance(asked, RecallConfig):
        from hdovd.pipelines.proposals.recall import recall_report

        recall_report(asked)
    else:
        from hdovd.pipelines.proposals.propose import propose as run

        run(asked)
