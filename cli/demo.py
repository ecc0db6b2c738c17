"""`hdovd demo`."""

from contextlib import suppress

import typer

from hdovd.cli.command import command
from hdovd.pipelines.demo.config import DemoConfig


@command
def demo(config: DemoConfig, context: typer.Context) -> None:
    """Prints every command before it runs, so that you can repeat it by hand. Minutes on two CPU cores."""
    from hdovd.pipelines.demo.run import demo as run

    root = context.find_root().command

    def call(words: list[str]) -> None:
        with suppress(typer.Exit), root.make_context("hdovd", words) as inner:
            root.invoke(inner)

    run(config, call)
