"""What `hdovd ablate` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import Catalog, is_tar_form
from hdovd.config.recipe import PRESETS
from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.common.options import (
    DEFAULT_RECIPE,
    PRESET,
    RECIPE_NAME,
    SET,
    Group,
    Option,
    Preset,
    RunsOptions,
    named_validation,
    refuse_two_sources,
    validation_group,
)
from hdovd.pipelines.training.config import check_oracle


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateConfig(RunsOptions):
    """`grid`: KEY=VALUE,VALUE,... each. `settings` and `preset`: for all cells. `jobs`: runs at a time.

    `data`: as for training; `validation`: as for evaluation, the same data set if None. Raises HdovdError if it makes
    no sense.
    """

    cache: Annotated[Path | str, Option("The one cache, or tar shards, that all runs read.")]
    out: Annotated[Path, Option("The folder of all runs, OUT/CELL/seedK, and of the tables.")]
    grid: Annotated[
        tuple[str, ...],
        Group(
            {
                "more": (
                    list[str] | None,
                    None,
                    Option("More of --grid, after it.", argument=True, metavar="[KEY=VALUE,VALUE]..."),
                ),
                "grid": (
                    list[str] | None,
                    None,
                    Option(
                        "What varies: loss.image.enabled=true,false. Repeatable; all combinations are run.",
                        metavar="KEY=VALUE,VALUE",
                    ),
                ),
            },
            lambda given: (*(given["grid"] or ()), *(given["more"] or ())),
        ),
    ]
    recipe: Annotated[str, RECIPE_NAME] = DEFAULT_RECIPE
    preset: Annotated[Preset | None, PRESET] = None
    settings: Annotated[tuple[str, ...], SET] = ()
    seeds: Annotated[int, Option("Runs a cell: train.seed 0, 1, ...", min=1)] = 3
    jobs: Annotated[
        int, Option("Runs at a time. Several GPUs are used in turn, one a run; CPU cores are shared.", min=1)
    ] = 1
    validation: Annotated[DataPaths | None, validation_group(named_validation)] = None
    oracle: Annotated[
        bool,
        Option(
            "Say of each cell how much of the novel gap it closes: two more cells, both without distillation, are run "
            "with the same seeds, base-only and oracle, which is trained on the boxes of novel classes too."
        ),
    ] = False
    dry_run: Annotated[bool, Option("List the runs, done and to do, and stop.")] = False

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise HdovdError(f"--{name} {getattr(self, name)}: expected 1 or more")
        refuse_two_sources((*self.settings, *self.grid), self.calibration)
        if (self.data.images or self.data.annotations) and self.validation is None:
            raise HdovdError(
                "--images and --annotations are those to train on: give --val-images and --val-annotations for "
                "evaluation"
            )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        (self.validation or self.data).locate("val2017")
        if self.oracle:
            check_oracle(self.cache, self.protocol)
        if not is_tar_form(self.cache):
            self.data.locate("train2017")
            Catalog(self.cache)

    @property
    def all_settings(self) -> tuple[str, ...]:
        """What is laid over the recipe in all cells."""
        return (
            *(PRESETS[self.preset] if self.preset else ()),
            *self.settings,
            *(read_calibration(self.calibration).settings() if self.calibration else ()),
        )
