"""`hdovd runs`: what was trained, and what differs between two runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hdovd.cli.main import Group, new_app


class _ListsByDefault(Group):
    """`hdovd runs FOLDER` is `hdovd runs ls FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["ls", *args]
        return super().parse_args(ctx, args)


app = new_app(
    cls=_ListsByDefault,
    help="""hdovd runs [FOLDER ...] [--json] lists; hdovd runs diff A B compares. Without a FOLDER: the current one.
    """,
)


@app.command()
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
    from hdovd.pipelines.runs import read_run
    from hdovd.pipelines.runs.listing import find_runs, run_lines, run_values

    runs = [read_run(path) for path in find_runs(folders or [Path()])]
    typer.echo(json.dumps(run_values(runs), indent=1) if json_ else "\n".join(run_lines(runs)))


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The run to compare it with.")],
) -> None:
    """Say what differs: config, cache, versions, commit; and AP50 by group and by class, the largest changes first."""
    from hdovd.pipelines.runs.listing import difference_lines

    typer.echo("\n".join(difference_lines(a, b)))
