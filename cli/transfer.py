"""`hdovd transfer`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.transfer.config import TransferConfig


@command
def transfer(config: TransferConfig) -> None:
    """No class is called base, and all are scored alike. Names are embedded by the text tower of the run's CLIP, once:
    they are kept in ~/.cache/hdovd. Results of each data set go to RUN/transfer/NAME.
    """
    from hdovd.pipelines.transfer.transfer import transfer as run, transfer_table

    found = run(config)
    typer.echo("\n".join([transfer_table(found), *(f"wrote {file}" for one in found.values() for file in one.files)]))
