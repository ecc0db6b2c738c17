"""What `hdovd adapt` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from hdovd.cache import is_tar_form
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import SET, Option, OtherProtocol, Trust
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig(TrainConfig):
    """A run, `init`, and the pictures that it is adapted to. `settings`: as of --set, over the run's recipe and what is
    chosen by the number of pictures; `recipe`: what that comes to.
    """

    init: Annotated[Path, Option("The run to begin with; it stays as it is.", argument=True, metavar="RUN")]
    cache: Annotated[Path | str, Option("The cache that extract-clip made of --data, by the CLIP of RUN.")]
    protocol: OtherProtocol = None  # type: ignore[assignment]
    recipe: Any = None
    oracle: bool = False
    val_every: int = 0
    settings: Annotated[tuple[str, ...], SET] = ()
    replay: Annotated[
        Path | str | None, Option("The cache that RUN was trained from, pictures of which are trained on again.")
    ] = None
    replay_data: Annotated[
        Path | None, Option("The data set of RUN, if it lies elsewhere than its cache says; also for the table.")
    ] = None
    share: Annotated[
        float | None, Option("Share of --replay's pictures in an epoch. Default: by how many new ones there are.")
    ] = None
    examples: Annotated[bool, Option("New classes whose names say nothing to CLIP are embedded by their boxes.")] = True
    teacher: Annotated[bool, Option("RUN labels its base classes on my pictures, where it is sure of them.")] = True
    mix: Annotated[
        float | None,
        Option("How much of the new weights, against RUN's: 0 to 1. Default: what is best on held-out pictures."),
    ] = None
    compare_naive: Annotated[bool, Option("Plain fine-tuning too, in OUT/naive, and its column in the table.")] = False
    trust: Trust = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunFolder.open(self.init, trusted=self.trust).recipe()
        faults = {
            f"--share {self.share}: expected a number between 0 and 1": self.share is not None
            and not 0 < self.share < 1,
            "--share is of the pictures of --replay, which is not given": self.share is not None
            and self.replay is None,
            f"--mix {self.mix}: expected a number from 0 to 1": self.mix is not None and not 0 <= self.mix <= 1,
            "tar shards are read from first to last alone: --cache and --replay take the Zarr caches that they were "
            "made from": is_tar_form(self.cache) or is_tar_form(str(self.replay)),
        }
        if why := next((why for why, wrong in faults.items() if wrong), ""):
            raise HdovdError(why)
        TrainConfig.check(replace(self, protocol=self.protocol or "ov-coco"))  # None: what the cache says
        if self.validation is not None:
            self.validation.locate("val2017")
