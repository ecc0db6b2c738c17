"""Code that a recipe names: `module:attribute`, found in the current folder or among what is installed.

Importing a module runs it, so a recipe is to be trusted like code. Detectors, backbones and losses that a recipe adds
are found here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from hdovd.config.backbone import BACKBONES
from hdovd.config.detector import DETECTORS
from hdovd.core.errors import HdovdError

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe

T = TypeVar("T")


def outside_code(recipe: Recipe) -> dict[str, str]:
    """What a recipe names that is not part of hdovd and runs when its detector is built: values by dotted key."""
    detector, body = recipe.detector.name, recipe.detector.backbone.name
    named = {} if detector in DETECTORS else {"detector.name": detector}
    library, _, model = body.partition(":")
    if body not in BACKBONES and (library not in ("timm", "torchvision") or ":" in model):  # timm:hf-hub:... is fetched
        named["detector.backbone.name"] = body
    return named | {f"loss.extra.{name}.use": extra.use for name, extra in recipe.loss.extra.items()}


def resolve_class(use: str, key: str, kind: type[T], expected: str) -> type[T]:
    """The subclass of `kind` that `use` names; `expected`: the name of `kind` that the message has. Raises HdovdError
    as `resolve` does.
    """
    found = resolve(use, key)
    if isinstance(found, type) and issubclass(found, kind):
        return found
    raise HdovdError(f"{key} = {use!r}: expected a class of {expected}, found {found!r}")


def resolve(use: str, key: str) -> Any:
    """The attribute that `use`, the value of the recipe's `key`, names.

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
