"""The command `hdovd`: one file a command, imported when it is asked for; errors on one screen."""

import os
import select
import sys
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_command

from hdovd.core import HdovdError, Stopped, __version__, is_printed, lines_to, system_line
from hdovd.pipelines.common.process import INTERRUPTED, limit_threads

PIPE_BROKE = 141  # as a shell says of SIGPIPE
_interrupts: list[int] = []


class Group(TyperGroup):
    """A group whose help shows the first paragraph of each command's help, whole."""

    def line_of(self, name: str) -> str:
        return " ".join((self.commands[name].help or "").split("\n\n")[0].split())

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.line_of(name)) for name in self.list_commands(ctx)])


def new_app(cls: type[TyperGroup] = Group, **settings: Any) -> typer.Typer:
    """A command or a group of them. Help and errors are plain text: importing rich takes longer than all else of a
    --help.
    """
    return typer.Typer(cls=cls, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


class _Commands(Group):
    """The commands, that stand in files of their names. `table`: the first paragraph of each one's help, by name.
    `folders`: of those that do not stand in `hdovd.cli` itself, by command.
    """

    folders: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("cache", "runs", "proposals", "bench"), "groups"),
        **dict.fromkeys(("export", "export-labels", "import-checkpoint", "push"), "exchange"),
    }
    table: ClassVar[dict[str, str]] = {  # the first paragraph of each command's help; the rest stands in its file
        "demo": "Run the main job on a small drawn world: propose, extract-clip, train (base-only and distilled), "
        "eval, report.",
        "propose": "Train a class-agnostic proposal network on base boxes, and write proposals for the training "
        "images.",
        "nouns": "Find the nouns in each image's captions: what its pseudo boxes may be named.",
        "extract-clip": "Run the frozen CLIP once and fill the cache: class names, nouns, images, base boxes and "
        "proposals.",
        "calibrate": "Say and draw how far pseudo labels are trusted, and what to expect of them, before training.",
        "relabel": "The next round: a trained detector proposes and names the pseudo boxes of a new set of the cache.",
        "train": "Train a detector from the cache; CLIP is not needed. --set overrides any value of the recipe.",
        "adapt": "Train a run on pictures of new classes, so that it still finds those that it knew; a table says what "
        "became of them.",
        "eval": "Detect on the validation images and print OV-COCO AP: novel, base, all, and split-blind beside it.",
        "transfer": "Evaluate a run on data sets that it was not trained on, by their class names: a table of AP.",
        "search": "Find the boxes of a cache that are most like words, pictures or other boxes; or near-duplicates and "
        "doubtful labels.",
        "detect": "Find anything that has a name in any pictures and videos.",
        "serve": "Find and search in a browser: a page for pictures, names, examples and the boxes of a cache.",
        "export": "Write the detector to one file for other programs: picture and class embeddings in, detections out.",
        "export-labels": "Write detections, pseudo boxes or doubtful labels for FiftyOne, Label Studio, CVAT, YOLO or "
        "COCO tools.",
        "import-checkpoint": "Make a run folder of the authors' published weights, for eval, detect, export and "
        "report.",
        "ablate": "Train and evaluate every cell of a grid with several seeds over one cache; write table.md, "
        "table.csv and table.tex.",
        "report": "Write one HTML page about a run, or several side by side: it needs no network and no other file.",
        "audit": "Check that nothing learned from novel annotations or from test pictures; exit with 1 on a leak.",
        "push": "Put a run or a cache on the Hugging Face Hub, with a card that tells what it is.",
        "cache": "Look into a feature cache, check it, mend it, tidy it.",
        "runs": "List runs as a table, or tell what differs between two.",
        "proposals": "Convert proposal files and look into them.",
        "bench": "Measure on this machine, on made-up data, what an extraction will cost.",
    }

    def __init__(self, **settings: Any) -> None:
        # What is listed, and what a mistyped name is compared with.
        super().__init__(**settings | {"commands": dict(self.table)})

    def line_of(self, name: str) -> str:
        return self.table[name]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command and put the words of the table before its own help."""
        if cmd_name not in self.table:
            return None
        word = cmd_name.replace("-", "_")
        module = import_module(".".join(["hdovd.cli", *self.folders.get(cmd_name, "").split(), word]))
        app = getattr(module, "app", None)
        if app is None:  # a single command
            app = new_app()
            app.command(cmd_name)(getattr(module, word))
        command: Any = get_command(app)
        command.help = f"{self.table[cmd_name]}\n\n{command.help or ''}"
        return command


app = new_app(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Open-vocabulary detection by distillation from CLIP.

    New here? hdovd demo runs everything on a small world of its own and prints each command.

    On your COCO folder, in this order: propose (class-agnostic boxes), nouns (of captions), extract-clip (run CLIP once, fill the
    cache, and say what to expect), train (the detector, without CLIP), eval (OV-COCO AP). Then detect finds anything that has a name, in any pictures and videos.
    """,  # noqa: E501
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hdovd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; `main` reads --debug itself, wherever it stands. What is logged is printed."""
    if not is_printed():  # not again for the commands of `hdovd demo`
        context.with_resource(lines_to(typer.echo))


def main() -> None:
    """Run a command and end with its exit code.

    1: an error of the user's input or of the system. 2: wrong words, and errors that are ours. 75, 130: a signal, or
    Ctrl-C, stopped it. 141: nobody reads what it prints. The last two are what a shell says of these signals.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = _run(arguments, debug=len(arguments) < len(sys.argv) - 1)
    except BrokenPipeError:  # of the error that was to be told
        code = PIPE_BROKE
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            error.filename = stream.name
            code = code or _tell(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter flushes once more
    if code:
        sys.exit(code)


def _run(arguments: list[str], *, debug: bool) -> int:
    """Returns the exit code; an error is told, or raised if `debug`."""
    try:
        if warning := limit_threads():
            typer.echo(warning, err=True)
        with get_command(app).make_context("hdovd", arguments) as context:
            context.command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        return stopped.code
    except (Exception, KeyboardInterrupt) as error:
        if _interrupts or isinstance(error, KeyboardInterrupt):
            typer.echo("stopped", err=True)
            return INTERRUPTED
        if debug and not hasattr(error, "show"):
            raise
        return _tell(error)
    return 0


def interrupt(number: int, _: FrameType | None) -> None:
    """Ctrl-C: KeyboardInterrupt, as Python has it. Noted, since modules that are being imported may make another error
    of it.
    """
    _interrupts.append(number)
    raise KeyboardInterrupt


def _tell(error: Any) -> int:
    """Say what went wrong on standard error; returns the exit code."""
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return PIPE_BROKE
    if hasattr(error, "show"):  # wrong words on the command line
        error.show()
        return int(error.exit_code)
    expected = isinstance(error, HdovdError | OSError)
    typer.secho("error: " if expected else "unexpected error: ", fg="red", err=True, nl=False)
    if expected:
        typer.echo(system_line(error) if isinstance(error, OSError) else str(error), err=True)
        return 1
    typer.echo(f"{type(error).__name__}: {error}\nRun it again with --debug to see where; please report it.", err=True)
    return 2


def _nobody_reads() -> bool:
    """Whether it is standard output or standard error whose reader is gone, and no other pipe."""
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)  # for errors alone
    return any(event & select.POLLERR for _, event in streams.poll(0))
