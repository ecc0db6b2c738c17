"""Prompt templates: the sets that ship (`templates/*.txt`), a user's own file, and what they make of names.

`{}` is where the name goes, once; `{article}` becomes a or an.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, is_file
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.common.options import Option

Name = str | tuple[str, ...]  # what a row of embeddings stands for: a name, or several names of one thing
ARTICLE = "{article}"
LONGEST_TEMPLATE = 1000  # characters
_SETS = Path(__file__).parent / "templates"


def shipped_templates() -> list[str]:
    return sorted(file.stem for file in _SETS.glob("*.txt"))


def read_templates(name_or_file: str) -> tuple[str, ...]:
    """A shipped set by name, or the lines of a file. Raises HdovdError if it is neither."""
    if name_or_file in shipped_templates():
        return read_vocabulary(_SETS / f"{name_or_file}.txt")
    if not is_file(name_or_file):
        raise HdovdError(
            f"--templates {name_or_file}: neither a set nor a file. The sets are {', '.join(shipped_templates())}; a "
            f"file has one prompt a line, with {{}} for the name"
        )
    return read_vocabulary(Path(name_or_file), "--templates", LONGEST_TEMPLATE)


Templates = Annotated[
    tuple[str, ...],
    Option(
        "Prompts: photo, vild, clip80, or a file, one a line: {} is the name, {article} its a or an.",
        parse=read_templates,
        text="photo",
    ),
]


def check_templates(templates: Sequence[str]) -> None:
    """Raises HdovdError for a template that does not hold the name once, or holds other braces than those that mean
    something.
    """
    for template in templates:
        found = re.findall(r"{[^{}]*}", template)
        if found.count("{}") != 1 or not set(found) <= {"{}", ARTICLE}:
            raise HdovdError(
                f"a prompt template holds {{}} once, where the name goes, and may hold {ARTICLE}; got {template!r}"
            )
    if not templates:
        raise HdovdError("no prompt template: one at least is needed, with {} where the name goes")


def said(name: Name) -> Name:
    """A name as prompts say it: underscores, as LVIS's names have them, are spaces."""
    return name.replace("_", " ") if isinstance(name, str) else tuple(one.replace("_", " ") for one in name)


def folded(name: str) -> str:
    """What names have in common that differ in case, underscores and spaces alone."""
    return " ".join(name.casefold().replace("_", " ").split())


def prompts(names: Sequence[Name], templates: Sequence[str]) -> Iterator[tuple[int, str]]:
    """All prompts with the row of their name, one at a time: row by row, name by name, in the order of the
    templates."""
    for row, name in enumerate(names):
        for one in (name,) if isinstance(name, str) else name:
            article = "an" if one.lower().startswith(tuple("aeiou")) else "a"  # by the first letter alone, as ViLD does
            yield from ((row, template.replace(ARTICLE, article).replace("{}", one)) for template in templates)
