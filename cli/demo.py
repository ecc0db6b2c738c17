"""`hdovd demo`."""

from contextlib import suppress

import typer

from hdovd.cli.command import command
from hdovd.pipelines.demo.config import DemoConfig


@command
def demo(config: DemoConfig, context: typer.Context) -> None:
    """Prints every command before it runs, so that you can repeat it by hand. Minutes on two CPU cores."""
    from hdovd.pipelines.demo.run import demo as run, demo_table

    root = context.find_root().command

    def call(words: list[str]) -> None:
        with suppress(typer.Exit), root.make_context("hdovd", words) as inner:
            root.invoke(inner)

    result = run(config, call)
    lines = [
        f"\n{demo_table(result)}",
        "pictures (detections with novel classes in orange; what the cache knows):",
        *(f"  {picture}" for picture in result.pictures),
        f"report, one page about all runs: {result.report}",
    ]
    typer.echo("\n".join(lines))
