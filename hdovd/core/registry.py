"""Names that stand for code: what comes with hdovd, by its name, and what is the user's own, as `module:attribute`.

Detectors, backbones, losses, teachers and engines of evaluation are found this way. Nothing is imported before it is
asked for. Importing a module runs it, so a file that names one is to be trusted like code.
"""

import difflib
import importlib
import os
import sys
from typing import Any, TypeVar

from hdovd.core import HdovdError

T = TypeVar("T")


class Registry(dict[str, str]):
    """`module:attribute` by name. A part is added by a line: `DETECTORS["grid"] = "my_module:Grid"`.

    `key`: the option, or key of a recipe, that holds a name; errors begin with it.
    """

    def __init__(self, key: str, known: dict[str, str]) -> None:
        super().__init__(known)
        self.key = key

    def require(self, name: str) -> None:
        """Imports nothing. Raises HdovdError for a name that is neither known nor `module:attribute`."""
        if name not in self and not all(name.partition(":")):
            near = difflib.get_close_matches(name, self, 1)
            raise HdovdError(
                f"{self.key} {name!r}{f', did you mean {near[0]}' if near else ''}: expected {', '.join(self)}, or "
                "my_module:name of your own"
            )

    def find(self, name: str) -> Any:
        """What is registered as `name`, or what it names itself. Raises HdovdError as `require` and `resolve` do."""
        self.require(name)
        return resolve(self.get(name, name), self.key)

    def find_class(self, name: str, kind: type[T], expected: str) -> type[T]:
        """The same, if it is a subclass of `kind`; HdovdError otherwise."""
        return resolve_class(self.get(name, name), self.key, kind, expected)


def resolve_class(use: str, key: str, kind: type[T], expected: str) -> type[T]:
    """The subclass of `kind` that `use` names; `expected`: the name of `kind` that the message has. Raises HdovdError
    as `resolve` does.
    """
    found = resolve(use, key)
    if isinstance(found, type) and issubclass(found, kind):
        return found
    raise HdovdError(f"{key} = {use!r}: expected a class of {expected}, found {found!r}")


def resolve(use: str, key: str) -> Any:
    """The attribute that `use`, the value of `key`, names: of a module in the current folder, or an installed one.

    Raises HdovdError naming the key if the module cannot be imported or has no such attribute.
    """
    module_name, colon, attribute = use.partition(":")
    if not (module_name and colon and attribute):
        raise HdovdError(f"{key} = {use!r}: expected module:name, such as my_module:MyLoss")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file random.py of the user's must not stand in for Python's own
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises
        raise HdovdError(
            f"{key} = {use!r}: cannot import {module_name} from {folder} or what is installed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), 1)
        raise HdovdError(
            f"{key} = {use!r}: {module_name} ({getattr(module, '__file__', 'built in')}) has no {attribute}"
            + (f"; did you mean {near[0]}" if near else "")
        )
    return getattr(module, attribute)
