"""The command `hdovd`: commands imported when they are asked for; errors on one screen."""

import os
import select
import sys
from inspect import cleandoc
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from hdovd.cli.commands import COMMANDS
from hdovd.core import __version__
from hdovd.core.errors import HdovdError, Stopped, system_line
from hdovd.core.log import is_printed, lines_to
from hdovd.pipelines.common.process import INTERRUPTED, limit_threads

PIPE_BROKE = 141  # as a shell says of SIGPIPE


class Group(TyperGroup):
    """A group whose help shows the first paragraph of each command's help, whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        paragraphs = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(paragraphs[name].split())) for name in self.list_commands(ctx)])


def new_app(cls: type[TyperGroup] = Group, **settings: Any) -> typer.Typer:
    """A command or a group of them. Help and errors are plain text: importing rich takes longer than all else of a
    --help.
    """
    return typer.Typer(cls=cls, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, **settings)


class _Commands(Group):
    """The commands of `COMMANDS`, each imported when it is asked for."""

    def __init__(self, **settings: Any) -> None:
        # What is listed, and what a mistyped name is compared with.
        super().__init__(**settings | {"commands": dict(COMMANDS)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (known := COMMANDS.get(cmd_name)) is None:
            return None
        if known.config:
            from hdovd.cli.command import of_config

            app = new_app()
            app.command(cmd_name)(of_config(resolve_name(known.config), lambda made: resolve_name(known.run)(made)))
        else:
            app = resolve_name(known.run)
        command: Any = get_command(app)
        command.help = "\n\n".join(filter(None, (cleandoc(known.help), command.help)))
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


def run_command(arguments: list[str]) -> None:
    """Run one command line, without the word hdovd."""
    command = get_command(app)
    with command.make_context("hdovd", arguments) as context:
        command.invoke(context)


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
        run_command(arguments)
    except typer.Exit as end:
        return end.exit_code
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        return stopped.code
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        return INTERRUPTED
    except Exception as error:
        if debug and not hasattr(error, "show"):
            raise
        return _tell(error)
    return 0


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
