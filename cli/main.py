"""The command `hdovd`: one file a command, errors on one screen."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import hdovd
from hdovd.cli import (
    ablate,
    audit,
    bench,
    cache,
    calibrate,
    demo,
    detect,
    eval,
    export,
    extract_clip,
    import_checkpoint,
    nouns,
    proposals,
    propose,
    report,
    runs,
    train,
)
from hdovd.errors import HdovdError, Stopped
from hdovd.pipelines.common.threads import limit_threads

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Open-vocabulary detection by distillation from CLIP.

    New here? [bold]hdovd demo[/bold] runs everything on a small world of its own and prints each command.

    On your COCO folder, in this order: [bold]propose[/bold] (class-agnostic boxes), [bold]nouns[/bold] (of captions),
    [bold]extract-clip[/bold] (run CLIP once, fill the cache), [bold]train[/bold] (the detector, without CLIP), [bold]eval[/bold]
    (OV-COCO AP).

    [bold]detect[/bold] finds anything that has a name, in any pictures.

    [bold]calibrate[/bold], before train, fits the trust in pseudo labels to any CLIP.
    [bold]cache[/bold] lists, compares, checks, mends and tidies what extract-clip wrote;
    [bold]runs[/bold] lists and compares what train wrote. [bold]ablate[/bold] trains and evaluates a grid of settings.
    [bold]report[/bold] writes one page about runs: AP, errors, pictures, curves.
    [bold]export[/bold] writes the detector as ONNX, TorchScript or safetensors.
    [bold]import-checkpoint[/bold] makes a run of the authors' published weights.
    [bold]audit[/bold] shows that no novel annotation was used; [bold]proposals[/bold] converts proposal files.
    """,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hdovd {hdovd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command; `main` reads --debug itself, wherever it stands."""


app.command("demo")(demo.demo)
app.command("propose")(propose.propose)
app.command("nouns")(nouns.nouns)
app.command("extract-clip")(extract_clip.extract_clip)
app.command("calibrate")(calibrate.calibrate)
app.command("train")(train.train)
app.command("eval")(eval.eval)
app.command("detect")(detect.detect)
app.command("export")(export.export)
app.command("import-checkpoint")(import_checkpoint.import_checkpoint)
app.command("ablate")(ablate.ablate)
app.command("report")(report.report)
app.command("audit")(audit.audit)
app.add_typer(cache.app, name="cache")
app.add_typer(runs.app, name="runs")
app.add_typer(proposals.app, name="proposals")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command; an error of the user's input is one message and exit code 1."""
    if warning := limit_threads():
        typer.echo(warning, err=True)
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="hdovd")
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        sys.exit(stopped.code)
    except HdovdError as error:
        if debug:
            raise
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        typer.secho("unexpected error: ", fg="red", err=True, nl=False)
        typer.echo(f"{type(error).__name__}: {error}\nRun it again with --debug to see where; please report it.", err=True)
        sys.exit(2)
