"""Commands from configs: Typer's signature of a command is made from the fields of the config that its function
takes."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from hdovd.pipelines.common.options import Group, Option

Field = tuple[
    str, list[inspect.Parameter], Callable[[dict[str, Any]], Any]
]  # name, parameters, value of all that was given


def command(body: Callable[[Any], object]) -> Callable[..., None]:
    """The Typer command of a function of one config, whose class its annotation says. Its docstring is the help."""
    return of_config(get_type_hints(body)["config"], body)


def of_config(config: type, body: Callable[[Any], object]) -> Callable[..., None]:
    """The Typer command that makes a config of its options, checks it and calls `body` with it.

    A field is an option if it is annotated with `Option`, several with `Group`, and none with neither.
    """
    fields = list(_fields(config))

    @wraps(body, assigned=("__name__", "__doc__"))
    def run(**given: Any) -> None:
        made = config(**{name: build(given) for name, _, build in fields})
        if hasattr(made, "check"):
            made.check()  # before torch: a mistake shows at once
        body(made)

    parameters = [parameter for _, own, _ in fields for parameter in own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fields(config: type) -> Iterator[Field]:
    """Name, parameters and value of every field that options make."""
    hints = get_type_hints(config, localns={"Recipe": Any}, include_extras=True)
    for field in dataclasses.fields(config):
        for note in getattr(hints[field.name], "__metadata__", ()):  # of Annotated
            if isinstance(note, Group):
                yield field.name, [_parameter(name, *given) for name, given in note.options.items()], note.build
            elif isinstance(note, Option):
                yield _field(field, get_args(hints[field.name])[0], note)


def _field(field: dataclasses.Field[Any], kind: Any, option: Option) -> Field:
    """A field of one option: text is parsed, lists become tuples, and what is not given keeps the field's default."""
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    parts = (
        [part for part in get_args(kind) if part is not type(None)]
        if get_origin(kind) in (Union, UnionType)
        else [kind]
    )
    many = get_origin(parts[0]) is tuple and option.parse is None
    if option.parse is not None:
        kind, default = (str if option.text is not None else str | None), option.text
    elif many:
        kind, default = list[get_args(parts[0])[0]], (default if default is inspect.Parameter.empty else None)  # type: ignore[misc]
        kind = kind if default is inspect.Parameter.empty else kind | None
    elif str in parts and Path in parts:
        kind = str

    def build(given: dict[str, Any]) -> Any:
        value = given[field.name]
        if value is None:
            return field.default if many else None
        return option.parse(value) if option.parse is not None else tuple(value) if many else value

    return field.name, [_parameter(field.name, kind, default, option)], build


def _parameter(name: str, kind: Any, default: Any, option: Option) -> inspect.Parameter:
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    flags = option.flags or ((f" /--no-{flag[2:]}",) if default is True else (flag,))
    about: dict[str, Any] = {"min": option.min, "max": option.max, "metavar": option.metavar, "readable": False}
    note = (typer.Argument if option.argument else partial(typer.Option, *flags))(help=option.help, **about)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, note])
