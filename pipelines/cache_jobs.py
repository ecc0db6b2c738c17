"""What is asked of a cache: `hdovd cache view`, `map` and `export`, `calibrate`, `audit`. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.cache.catalog import Catalog, is_tar_form
from hdovd.cache.schema import DEFAULT_SET, TAR_SAMPLES
from hdovd.coco import DataPaths
from hdovd.errors import HdovdError, require_files
from hdovd.pipelines.calibration import read_calibration
from hdovd.protocol import load_protocol

if TYPE_CHECKING:
    from hdovd.config import Recipe


@dataclass(frozen=True, slots=True)
class CacheSource:
    """A set of a cache. `data` and `protocol`: None for what the set says it was made from; parts of `data` count for themselves."""

    cache: Path | str
    features: str = DEFAULT_SET
    data: DataPaths | None = None
    protocol: str | None = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if is_tar_form(self.cache):
            raise HdovdError(f"{self.cache} is of tar shards: this needs the Zarr cache that they were made from, or one that hdovd cache "
                             "import --format webdataset makes of them")
        Catalog(self.cache)
        if self.protocol is not None:
            load_protocol(self.protocol)
        if self.data is not None and self.data.root is not None:
            self.data.locate("train2017")


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


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """`data` and `protocol`: None for those that the set was extracted from. `out`: the TOML file; the picture lies beside it, .png."""

    cache: Path | str
    out: Path
    features: str = DEFAULT_SET
    data: DataPaths | None = None
    protocol: str | None = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".toml":  # the picture has its name, and another ending
            raise HdovdError(f"--out {self.out}: expected a name that ends in .toml")
        CacheSource(self.cache, self.features, self.data, self.protocol).check()


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """What to export. `data` and `protocol`: None for those that the set was extracted from. `samples`: of a shard."""

    cache: Path | str
    out: Path | str
    data: DataPaths | None = None
    protocol: str | None = None
    features: str = DEFAULT_SET
    samples: int = TAR_SAMPLES

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        CacheSource(self.cache, self.features, self.data, self.protocol).check()


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """`features`: the set of the cache. `run`: a folder of hdovd train. `proposals`: the file that the cache was made from, where its
    set does not say what made them. `json_out`: where to write the report as JSON too."""

    data: DataPaths
    cache: Path | str
    protocol: str = "ov-coco"
    features: str = DEFAULT_SET
    run: Path | None = None
    proposals: Path | None = None
    json_out: Path | None = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.json_out is not None and self.json_out.is_dir():
            raise HdovdError(f"--json {self.json_out} is a folder: expected the file to write")
        load_protocol(self.protocol)
        self.data.annotation_file("train2017")
        Catalog(self.cache)
        require_files(run=None if self.run is None else self.run / "run.json", proposals=self.proposals)
