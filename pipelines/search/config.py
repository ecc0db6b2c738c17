"""What `hdovd search` is asked for. Imports no torch: a mistake shows before that."""

import contextlib
import re
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, require_files
from hdovd.pipelines.common.options import ClipOptions, Option
from hdovd.pipelines.extraction.source import CacheSource

Box = tuple[float, float, float, float]


class BoxSource(StrEnum):
    BASE = "base"
    PROPOSAL = "proposal"


class Duplicates(StrEnum):
    PICTURES = "pictures"
    BOXES = "boxes"


def weighted(text: str) -> tuple[str, float]:
    """A part of a query and its weight: `red umbrella=2` is "red umbrella" with weight 2; without a weight 1. Raises
    HdovdError for a weight that is no positive number.
    """
    found = re.fullmatch(r"(.+)=([-+.\d][-+.\deE]*)", text, re.DOTALL)
    if found is None:
        return text, 1.0
    with contextlib.suppress(ValueError):
        if 0 < (weight := float(found[2])) < inf:
            return found[1], weight
    raise HdovdError(f"{text}: a weight is a number above 0, such as {found[1]}=0.5; what it is to be unlike is --not")


def parse_box(text: str) -> Box:
    """x,y,w,h. Raises HdovdError."""
    try:
        left, top, width, height = map(float, text.split(","))
    except ValueError:
        raise HdovdError(f"--box {text}: expected x,y,w,h in pixels, such as 10,20,64,48") from None
    return left, top, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig(ClipOptions, CacheSource):
    """A question to a set of a cache: a query of parts, each with a weight, or one of `duplicates`, `suspicious`,
    `untypical`. `box`: xywh, pixels of the upright `image`. `min_side`: pixels of the original image.
    """

    queries: Annotated[
        tuple[str, ...],
        Option('Words, such as "red umbrella"; "red umbrella=2" counts twice.', argument=True, metavar="[QUERY]..."),
    ] = ()
    image: Annotated[tuple[str, ...], Option("Search by a picture; FILE=2 counts twice. Repeatable.")] = ()
    box: Annotated[
        Box | None, Option("The box x,y,w,h of --image that is meant, in pixels. Default: all of it.", parse=parse_box)
    ] = None
    like: Annotated[
        tuple[str, ...],
        Option("Search by a box of the cache, IMAGE_ID:ROW as the table has it. Repeatable.", metavar="IMAGE_ID:ROW"),
    ] = ()
    embeddings: Annotated[
        Path | None,
        Option("Search by embeddings of the set's CLIP, (n, D), in .npy, .safetensors, .pt; CLIP is not needed."),
    ] = None
    not_: Annotated[tuple[str, ...], Option('Words to be unlike; "words=0.5" counts half. Repeatable.')] = ()
    duplicates: Annotated[
        Duplicates | None, Option("List near-duplicates instead: pairs of pictures, or of boxes of two pictures.")
    ] = None
    suspicious: Annotated[
        bool, Option("List base boxes instead whose crop speaks for another base class, the clearest first.")
    ] = False
    untypical: Annotated[
        str | None, Option("List the boxes of a base class instead that are least like the others.", metavar="CLASS")
    ] = None
    source: Annotated[BoxSource | None, Option("Boxes of this kind alone.")] = None
    noun: Annotated[str | None, Option("Proposals that are called this alone.")] = None
    class_: Annotated[str | None, Option("Base boxes of this class alone.")] = None
    min_side: Annotated[float, Option("Boxes with a shorter side of so many pixels alone.", min=0)] = 0.0
    score: Annotated[
        float, Option("Boxes with a score of at least this alone: of proposals; base boxes have 1.")
    ] = -inf
    least: Annotated[float, Option("The cosine from which on two are near-duplicates.", min=-1, max=1)] = 0.95
    count: Annotated[int, Option("How many are listed.", min=1, flags=("--count", "-k"))] = 20
    index: Annotated[
        bool, Option("Let the index of hdovd cache index offer candidates: fast, and approximate in which are found.")
    ] = False
    json_: Annotated[bool, Option("Print a JSON list instead of the table.")] = False
    out: Annotated[Path | None, Option("Write a page with their crops too, FILE.html.")] = None

    coco: Annotated[Path | None, Option("Write them in COCO results form too; category_id is 1, score the cosine.")] = (
        None
    )

    def __post_init__(self) -> None:
        ClipOptions.__post_init__(self)
        if sum((self.is_query, self.duplicates is not None, self.suspicious, self.untypical is not None)) != 1:
            raise HdovdError(
                "expected one question: what to search for (words, --image, --like, --embeddings), or --duplicates, "
                "--suspicious or --untypical CLASS"
            )
        if self.index and not self.is_query:
            raise HdovdError(
                "--index is for what is like something: --duplicates, --suspicious and --untypical take none"
            )
        if self.untypical is not None and self.class_ is not None:
            raise HdovdError("--untypical CLASS says the class already: leave --class out")
        filters = (self.source, self.noun, self.class_, self.min_side, self.score)
        if self.duplicates is Duplicates.PICTURES and filters != (None, None, None, 0, -inf):
            raise HdovdError("--duplicates pictures compares whole pictures: filters are for --duplicates boxes")
        if self.box is not None and len(self.image) != 1:
            raise HdovdError("--box is a box of --image: give one --image with it")

    @property
    def is_query(self) -> bool:
        """Whether it is asked for what is like, or unlike, something."""
        return bool(self.queries or self.image or self.like or self.embeddings or self.not_)

    @property
    def question(self) -> str:
        """In a line."""
        parts = [
            *self.queries,
            *self.image,
            *(f"like {text}" for text in self.like),
            *(f"not {text}" for text in self.not_),
            *map(str, filter(None, [self.embeddings])),
            *["suspicious labels"] * self.suspicious,
            *[f"untypical {self.untypical}"] * bool(self.untypical),
        ]
        return ", ".join(parts) or f"near-duplicate {self.duplicates}"

    @property
    def of_class(self) -> str | None:
        """The base class whose boxes alone are asked for."""
        return self.untypical or self.class_

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out is not None and self.out.suffix != ".html":
            raise HdovdError(f"--out {self.out}: expected a name that ends in .html")
        CacheSource.check(self)
        require_files(embeddings=self.embeddings)
