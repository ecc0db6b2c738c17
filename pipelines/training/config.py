"""What `hdovd train` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import Catalog, is_hub, is_tar_form
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import load_protocol
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.common.options import RECIPE_AND_PRESET, NetworkOptions, Option, RunsOptions
from hdovd.pipelines.runs import RunFolder, TrackOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(NetworkOptions, TrackOptions, RunsOptions):
    """One training run, from a Zarr cache with the `data` that it was made of, or from tar shards, which need no other
    data.

    `validation`: images on which AP is computed after every `val_every` epochs; None: never. `calibration`: a file of
    `calibrate`.
    """

    cache: Annotated[
        Path | str,
        Option("The cache that extract-clip wrote; or tar shards, without --data: DIR, DIR/{000000..000009}.tar."),
    ]
    out: Annotated[Path, Option("The run folder to write.")]
    recipe: Annotated[Recipe, RECIPE_AND_PRESET]
    overwrite: Annotated[bool, Option("Replace a run that is there.")] = False
    resume: Annotated[
        bool,
        Option(
            "Go on from the checkpoint in OUT, or begin if there is none: for jobs that may be started again.",
            flags=("--resume", "--requeue-safe"),
        ),
    ] = False
    val_every: Annotated[int, Option("Validate after so many epochs; 0: never.", min=0)] = 1
    oracle: Annotated[
        bool,
        Option(
            "Train on the boxes of novel classes too, without distillation (--preset base-only): the upper bound that "
            "hdovd ablate --oracle measures by. No open-vocabulary detector, as its run.json says."
        ),
    ] = False
    checksums: Annotated[
        bool,
        Option(
            "Do not read each part of the cache whole, once, to compare its checksum: for caches larger than "
            "memory, which hdovd cache verify has checked."
        ),
    ] = True

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        if is_hub(self.out):
            raise HdovdError(f"--out {self.out}: train into a folder; hdovd push puts it on the Hub")
        TrackOptions.check(self)
        if self.oracle:
            check_oracle(self.cache, self.protocol)
            if self.recipe.loss.uses_cache or self.recipe.loss.extra:
                raise HdovdError(
                    "--oracle is trained without distillation, for which the cache has no embeddings of novel boxes: "
                    "give --preset base-only"
                )
        if not (self.resume or self.overwrite):
            RunFolder.require_none(self.out)
        if self.init is not None:
            if self.init.resolve() == self.out.resolve():
                raise HdovdError(
                    f"--init {self.init} is --out too: give another --out, or --resume to go on with that run"
                )
            if not (self.resume and (self.out / "checkpoint.pt").is_file()):  # a run that goes on needs it no more
                RunFolder.open(self.init)
        if self.calibration is not None:
            read_calibration(self.calibration)
        if not is_tar_form(self.cache):
            self.data.locate("train2017")
            Catalog(self.cache)
        if self.validation is not None and self.val_every:
            self.validation.locate("val2017")


def check_oracle(cache: Path | str, protocol: str) -> None:
    """Raises HdovdError if no oracle can be trained: the cache does not lead to novel boxes, or there are none."""
    if is_tar_form(cache):
        raise HdovdError(
            f"--oracle reads boxes of novel classes, and the tar shards {cache} hold none: give the Zarr cache that "
            f"they were exported from, with --data"
        )
    if not load_protocol(protocol).novel:
        raise HdovdError(f"--oracle: protocol {protocol} has no novel classes, so there is no gap to measure")
