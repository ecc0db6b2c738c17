"""`hdovd demo`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder for the world, the cache and the runs.")] = Path("hdovd-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Train both detectors with this many seeds; the table shows the spread.")] = 1,
    teacher_folder: Annotated[
        Path | None, typer.Option("--teachers", help="Where the demo's CLIP is kept; default ~/.cache/hdovd/teachers.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Write small copies of three pictures here, as in the README.")
                        ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a value of the demo recipe in every run.")] = None,
) -> None:
    """Prints every command before it runs, so that you can repeat it by hand. Minutes on two CPU cores.
    """
    from hdovd.pipelines.demo.config import DemoConfig

    config = DemoConfig(out, seeds, teacher_folder, settings=tuple(set_ or ()), pictures=pictures)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.demo.run import demo as run
    from hdovd.pipelines.demo.run import demo_table

    def command(words: list[str]) -> None:
        root = context.find_root().command
        with suppress(typer.Exit), root.make_context("hdovd", words) as inner:
            root.invoke(inner)

    result = run(config, command, typer.echo)
    typer.echo("\n" + demo_table(result))
    typer.echo("pictures (detections with novel classes in orange; what the cache knows):")
    for picture in result.pictures:
        typer.echo(f"  {picture}")
    typer.echo(f"report, one page about all runs: {result.report}")
