"""What `hdovd train` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hdovd.cache.catalog import Catalog, is_tar_form
from hdovd.cache.schema import DEFAULT_SET
from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths, instances_file
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.runs.folder import RunFolder

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run. `cache`: a Zarr cache, with the `data` that it was made of, or tar shards, which need no other data.

    `resume`: go on from the checkpoint in `out`, or begin if there is none. `save_minutes`: between two checkpoints within an
    epoch. `validation`: validation images, on which AP is computed after every `val_every` epochs; None: never. `calibration`: a
    file of `calibrate`, whose values the weights of pseudo labels take instead of the recipe's. `init`: a run whose model's weights the
    new one begins with. `checksums`: compare those of a Zarr cache's instance rows, each part once, when it is first read.
    """

    data: DataPaths
    cache: Path | str
    out: Path
    recipe: Recipe
    protocol: str = "ov-coco"
    device: str = "auto"
    overwrite: bool = False
    features: str = DEFAULT_SET
    resume: bool = False
    save_minutes: float = 10.0
    validation: DataPaths | None = None
    val_every: int = 1
    tensorboard: bool = False
    calibration: Path | None = None
    init: Path | None = None
    checksums: bool = True

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        if not (self.resume or self.overwrite):
            RunFolder.require_none(self.out)
        if self.init is not None:
            if self.init.resolve() == self.out.resolve():
                raise HdovdError(f"--init {self.init} is --out too: give another --out, or --resume to go on with that run")
            if not (self.resume and (self.out / "checkpoint.pt").is_file()):  # a run that goes on needs it no more
                RunFolder.open(self.init)
        if self.calibration is not None:
            read_calibration(self.calibration)
        if not is_tar_form(self.cache):
            self.data.locate("train2017")
            Catalog(self.cache)
        if self.validation is not None and self.val_every:
            self.validation.locate("val2017")


def validation_paths(data: Path | None, images: Path | None, annotations: Path | None) -> DataPaths | None:
    """The validation images: those named, or val2017 of a COCO folder that has one; else None."""
    if images or annotations:
        return DataPaths(data, images, annotations)
    if data is not None and instances_file(data, "val2017").is_file() and (data / "val2017").is_dir():
        return DataPaths(data)
    return None
