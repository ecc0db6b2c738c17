"""What `hdovd cache view` and `hdovd cache export --to parquet` are asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.core.errors import HdovdError
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.extraction.source import CacheSource

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class ParquetConfig:
    """`out`: the file to write, on this machine."""

    source: CacheSource
    out: Path

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".parquet":
            raise HdovdError(f"--out {self.out}: expected a file whose name ends in .parquet")
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
