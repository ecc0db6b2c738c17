"""Groups of commands: `hdovd runs`, what was trained, and what differs between two runs; `hdovd proposals`, what a
proposal file holds, and other forms of it; `hdovd bench`, what an extraction will cost on your machine.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from hdovd.cli.command import command
from hdovd.cli.main import Group, new_app
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.options import ListOrder
from hdovd.pipelines.extraction.forecast_config import ForecastConfig
from hdovd.pipelines.runs.listing import difference_lines, read_runs, run_lines, run_values


class _ListsByDefault(Group):
    """`hdovd runs FOLDER` is `hdovd runs ls FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["ls", *args]
        return super().parse_args(ctx, args)


runs_app = new_app(
    cls=_ListsByDefault,
    help="""hdovd runs [FOLDER ...] [--json] lists; hdovd runs diff A B compares. Without a FOLDER: the current one.
    """,
)


@runs_app.command()
def ls(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Where to look, at any depth. Default: here.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON list instead: all of the table, and the versions.")
    ] = False,
) -> None:
    """List all runs: the settings in which they differ, levels, seed, epochs, AP50, cache, date and state.

    A run that is under way shows as stopped. A damaged run is listed, with what is wrong.
    """
    runs = read_runs(folders or [Path()])
    typer.echo(json.dumps(run_values(runs), indent=1) if json_ else "\n".join(run_lines(runs)))


@runs_app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The run to compare it with.")],
) -> None:
    """Say what differs: config, cache, versions, commit; and AP50 by group and by class, the largest changes first."""
    typer.echo("\n".join(difference_lines(a, b)))


proposals_app = new_app(
    no_args_is_help=True,
    help="""Read are COCO results JSON, hdovd's .npz, and the .pkl of mmdetection and Detectron2 (without running what is in it).
    A proposal file has an identity: a hash of boxes and scores by image id, whatever its form and order.
    """,  # noqa: E501
)

Source = Annotated[Path, typer.Argument(metavar="FILE", help="The proposal file: .json, .npz or .pkl.")]
Annotations = Annotated[
    Path | None,
    typer.Option(
        "--annotations", help="The annotation file whose images a .pkl list goes through; other forms need none."
    ),
]
Order = Annotated[
    ListOrder,
    typer.Option("--order", help="How a .pkl list goes through them: as the file lists them, or by image id."),
]


@proposals_app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="What to write: .npz, or .json for COCO results.")],
    annotations: Annotations = None,
    order: Order = ListOrder.FILE,
) -> None:
    """Write the proposals in another form: the same boxes, scores and identity, and what made them if that is known."""
    from hdovd.pipelines.proposal_files.file import convert_proposals

    convert_proposals(source, out, annotations, order)


@proposals_app.command()
def info(source: Source, annotations: Annotations = None, order: Order = ListOrder.FILE) -> None:
    """Tell how many proposals a file holds, their identity, and what made them."""
    from hdovd.pipelines.proposal_files.file import info_lines

    typer.echo("\n".join(info_lines(source, annotations, order)))


bench_app = new_app(no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measure on this machine, on made-up data."""


@bench_app.command()
@command
def extract(config: ForecastConfig) -> None:
    """Measure the extraction beside the bare model, stage by stage, and forecast what a data set costs."""
    from hdovd.pipelines.extraction.forecast import forecast, forecast_lines

    with TemporaryDirectory(prefix="hdovd-bench-", dir=config.folder) as place:
        found = forecast(config, Path(place))
    typer.echo("\n".join(forecast_lines(found)))
    if config.json_file is not None:
        write_text(config.json_file, json.dumps(found, indent=1))
