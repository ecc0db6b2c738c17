"""Commands whose modules are imported when they are called or their own help is shown: the list of all of them costs
none of that.
"""

from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_command


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


class LazyGroup(Group):
    """A group of commands that stand in files of their names. `table`: the first paragraph of each one's help, by
    name."""

    table: ClassVar[dict[str, str]]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: dict[str, Any] = dict(self.table)
        self.commands = names  # what is listed, and what a mistyped name is compared with

    def line_of(self, name: str) -> str:
        return self.table[name]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command and put the words of the table before its own help."""
        if cmd_name not in self.table:
            return None
        word = cmd_name.replace("-", "_")
        module = import_module(f"hdovd.cli.{word}")
        app = getattr(module, "app", None)
        if app is None:  # a single command
            app = new_app()
            app.command(cmd_name)(getattr(module, word))
        command: Any = get_command(app)
        command.help = f"{self.table[cmd_name]}\n\n{command.help or ''}"
        return command
