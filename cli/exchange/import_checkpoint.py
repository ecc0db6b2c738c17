"""`hdovd import-checkpoint`."""

from hdovd.cli.command import command
from hdovd.pipelines.runs import ImportCheckpointConfig


@command
def import_checkpoint(config: ImportCheckpointConfig) -> None:
    """Every tensor of the file is used or named, and nothing of it is run: a file of anything but tensors is
    refused."""
    from hdovd.pipelines.training.initial_weights import import_checkpoint as run

    run(config)
