"""What `hdovd cache view` and `hdovd cache export --to parquet` are asked for. Imports no torch: a mistake shows before
that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hdovd.cache.schema import DEFAULT_SET, TAR_SAMPLES
from hdovd.core.errors import HdovdError
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.common.options import (
    DATA,
    FEATURES,
    MISSING,
    OTHER_PROTOCOL,
    SET,
    Calibration,
    Group,
    Option,
    data_if_given,
    read_recipe,
)
from hdovd.pipelines.extraction.source import CacheSource
from hdovd.pipelines.extraction.tar_config import TarExportConfig

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


def source_of(given: dict[str, Any]) -> CacheSource:
    return CacheSource(given["cache"], given["features"], data_if_given(given), given["protocol"])


SOURCE = Group(
    {
        "cache": (str, MISSING, Option("The cache: a folder, or s3://, gs://.", argument=True)),
        "features": (str, DEFAULT_SET, FEATURES),
        **DATA,
        "protocol": (str | None, None, OTHER_PROTOCOL),
    },
    source_of,
)


class ExportForm(StrEnum):
    WEBDATASET = "webdataset"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetConfig:
    """`out`: the file to write, on this machine."""

    source: CacheSource
    out: Path

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".parquet":
            raise HdovdError(f"--out {self.out}: expected a file whose name ends in .parquet")
        self.source.check()


def _recipe(given: dict[str, Any]) -> Recipe | None:
    if given["recipe"] is None and given["set_"]:
        raise HdovdError("--set lays values over a recipe: give --recipe too")
    return None if given["recipe"] is None else read_recipe(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """`images`: ids, or `random` or `random:N`; empty: the first that has rows. `seed`: which random ones.

    `out`: a PNG, or a folder for IMAGEID.png. `calibration`, `recipe`: where weights are from; None: those known for
    the cache's CLIP.
    """

    source: Annotated[CacheSource, SOURCE]
    images: Annotated[
        tuple[str, ...],
        Group(
            {
                "image": (
                    list[str] | None,
                    None,
                    Option(
                        "An image id, repeatable or with commas between; random, random:5. Default: the first image "
                        "that has boxes.",
                        metavar="ID",
                    ),
                )
            },
            lambda given: tuple(
                word.strip() for words in given["image"] or () for word in words.split(",") if word.strip()
            ),
        ),
    ] = ()
    out: Annotated[Path, Option("The PNG to write, or a folder for ID.png. Default: ID.png in this folder.")] = Path()
    calibration: Calibration = None
    recipe: Annotated[
        Recipe | None,
        Group(
            {
                "recipe": (str | None, None, Option("Take the weights of this recipe, shipped or a TOML file.")),
                "set_": (list[str] | None, None, SET),
            },
            _recipe,
        ),
    ] = None
    seed: Annotated[int, Option("Which images random takes.")] = 0

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix not in ("", ".png"):
            raise HdovdError(f"--out {self.out}: expected a name that ends in .png, or a folder")
        self.source.check()
        if self.calibration is not None:
            read_calibration(self.calibration)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `hdovd cache export` is asked for, of which the config of a form follows."""

    source: Annotated[CacheSource, SOURCE]
    to: Annotated[ExportForm, Option("The form: tar shards that the webdataset package reads, or a Parquet file.")]
    out: Annotated[str, Option("The folder to write, or s3://, gs://; for parquet a file, FILE.parquet.")]
    samples: Annotated[int, Option("Images a tar shard; it is held in memory while it is made.", min=1)] = TAR_SAMPLES

    def config(self) -> ParquetConfig | TarExportConfig:
        if self.to is ExportForm.PARQUET:
            return ParquetConfig(source=self.source, out=Path(self.out))
        source = self.source
        return TarExportConfig(
            cache=source.cache,
            out=self.out,
            data=source.data,
            protocol=source.protocol,
            features=source.features,
            samples=self.samples,
        )
