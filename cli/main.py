"""The command `hdovd`: one file a command, imported when it is asked for; errors on one screen."""

from __future__ import annotations

import sys
from typing import Annotated, ClassVar

import typer

import hdovd
from hdovd.cli.lazy import LazyGroup, new_app
from hdovd.errors import HdovdError, Stopped
from hdovd.pipelines.common.threads import limit_threads


class _Commands(LazyGroup):
    table: ClassVar[dict[str, str]] = {  # the first paragraph of each command's help; the rest stands in its file
        "demo": "Run the main job on a small drawn world: propose, extract-clip, train (base-only and distilled), "
                "eval, report.",
        "propose": "Train a class-agnostic proposal network on base boxes, and write proposals for the training "
                   "images.",
        "nouns": "Find the nouns in each image's captions: what its pseudo boxes may be named.",
        "extract-clip": "Run the frozen CLIP once and fill the cache: class names, nouns, images, base boxes and "
                        "proposals.",
        "calibrate": "Fit how far pseudo labels are trusted, w = scale * sigmoid((cosine - centre) / width), for the "
                     "cache's CLIP and prompts.",
        "train": "Train a detector from the cache; CLIP is not needed. --set overrides any value of the recipe.",
        "eval": "Detect on the validation images and print OV-COCO AP: novel, base, all, and split-blind beside it.",
        "detect": "Find anything that has a name in any pictures.",
        "export": "Write the detector to one file for other programs: picture and class embeddings in, detections out.",
        "import-checkpoint": "Make a run folder of the authors' published weights, for eval, detect, export and "
                             "report.",
        "ablate": "Train and evaluate every cell of a grid with several seeds over one cache; write table.md, "
                  "table.csv and table.tex.",
        "report": "Write one HTML page about a run, or several side by side: it needs no network and no other file.",
        "audit": "Check that nothing learned from novel annotations or from test pictures; exit with 1 on a leak.",
        "cache": "Look into a feature cache, check it, mend it, tidy it.",
        "runs": "List runs as a table, or tell what differs between two.",
        "proposals": "Convert proposal files and look into them.",
        "bench": "Measure the cache, the extraction and the evaluation on this machine, on made-up data.",
    }


app = new_app(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Open-vocabulary detection by distillation from CLIP.

    New here? hdovd demo runs everything on a small world of its own and prints each command.

    On your COCO folder, in this order: propose (class-agnostic boxes), nouns (of captions), extract-clip (run CLIP once, fill the
    cache), calibrate (the trust in pseudo labels, for other CLIPs than OpenAI's), train (the detector, without CLIP), eval (OV-COCO AP).
    Then detect finds anything that has a name, in any pictures.
    """,
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
