"""What `hdovd cache view` and `map` are asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.core.errors import HdovdError
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.extraction.source import CacheSource

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


class Colour(StrEnum):
    """What gives a point its colour: class of base boxes and noun of proposals, or one of them alone, or the nearest class name."""

    NAME = "name"
    CLASS = "class"
    NOUN = "noun"
    NEAREST = "nearest"
    SOURCE = "source"


@dataclass(frozen=True, slots=True)
class MapConfig:
    """`out`: the HTML file; the PNG lies beside it. `points`: at most so many rows, of a choice that follows from `seed`.

    `thumbnails`: so many points of the page show their crop.
    """

    source: CacheSource
    out: Path = Path("cache-map.html")
    points: int = 5_000
    colour: Colour = Colour.NAME
    seed: int = 0
    thumbnails: int = 0

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".html":
            raise HdovdError(f"--out {self.out}: expected a name that ends in .html; the picture lies beside it, as .png")
        self.source.check()


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """`images`: ids, or `random` or `random:N`; empty: the first that has rows. `seed`: which random ones.

    `out`: a PNG, or a folder for IMAGEID.png. `calibration`, `recipe`: where weights are from; None: those known for the cache's CLIP.
    """

    source: CacheSource
    images: tuple[str, ...] = ()
    out: Path = Path()
    calibration: Path | None = None
    recipe: Recipe | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix not in ("", ".png"):
            raise HdovdError(f"--out {self.out}: expected a name that ends in .png, or a folder")
        self.source.check()
        if self.calibration is not None:
            read_calibration(self.calibration)
