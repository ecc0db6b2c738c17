"""What extraction asks of a frozen model: CLIP is one (`openclip`), and any other can be (docs/EXTENDING.md); the kinds
that a command can name, the activations of CLIP's transformers, and the prompts that names become. Imports no torch,
for the sake of --help.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from hdovd.core import HdovdError, is_file
from hdovd.core.registry import Registry
from hdovd.pipelines.common.name_list import read_vocabulary
from hdovd.pipelines.common.options import Option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Name = str | tuple[str, ...]  # what a row of embeddings stands for: a name, or several names of one thing
OPEN_CLIP = "open_clip"
# Functions that take what `openclip.load_clip` takes, and return a `Teacher`.
TEACHERS = Registry("--teacher", {OPEN_CLIP: "hdovd.pipelines.teachers.openclip:load_clip"})


class Activation(StrEnum):
    AUTO = "auto"
    GELU = "gelu"
    QUICK_GELU = "quickgelu"


class Teacher(Protocol):
    """Embeds pictures and names. n pictures or texts, D embedding size.

    `identity`: what determines the answers, preprocessing aside; JSON values. `notes`: what a user should read.
    `made_with`: what a user may want to know later, of no weight in the identity. It may also have a `temperature`, of
    its softmax over cosines: 1 / the logit scale, 0.01 without.
    """

    dim: int
    device: torch.device
    identity: dict[str, Any]
    notes: Sequence[str] = ()
    made_with: dict[str, Any] = {}  # noqa: RUF012  # nothing adds to it

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""

    @property
    def fit(self) -> Callable[[Tensor], Tensor]:
        """Resizes a picture, (3, h, w) uint8 -> (3, *input_size) uint8; called in worker processes."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What of it determines embeddings, as JSON values: a part of the identity of pictures."""

    def embed_images(self, pixels: Tensor) -> np.ndarray:
        """(n, 3, *input_size) uint8 -> (n, D) float32, L2-normalised. Called by several threads at once."""

    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        """Names -> (n, D) float32, L2-normalised: the mean over templates and over a row's names (METHOD section 2)."""

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        """A hash of what the text tower is given for every prompt: the tokenizer's part of the identity."""

    def prompt_notes(self, names: Sequence[Name], templates: Sequence[str]) -> list[str]:
        """What the user should know of the prompts: which are too long for the text tower."""
        return []

    def best_batch(self) -> int:
        """How many pictures to embed at a time, found out on the device."""
        return 64

    def peak_memory_bytes(self) -> int | None:
        """The most GPU memory that was in use, or None without a GPU."""
        return None


# --- prompts: the sets that ship (`templates/*.txt`) or a user's own file; `{}` is where the name goes, once ---

ARTICLE = "{article}"  # becomes a or an
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
