"""What `hdovd eval` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError
from hdovd.data import load_protocol
from hdovd.evaluation import ENGINES, Engine
from hdovd.pipelines.common.options import ClipNames, Data, InferenceOptions, Option
from hdovd.pipelines.runs import ExampleOptions, RunOptions, TrackOptions

ZERO_SHOT = "zero-shot"  # the protocol of data sets that the run was not trained on: all classes are novel
SHOWN_SCORE = 0.3  # detections of this score or more are drawn


@dataclass(frozen=True, kw_only=True)
class EvalOptions(InferenceOptions, RunOptions):
    """How runs are evaluated."""

    engine: Annotated[
        str,
        Option(
            "What counts AP: pycocotools; faster-coco-eval, which gives the same sooner and comes with hdovd's extra "
            "fast-eval; or my_module:engine, a function that returns classes with their interface."
        ),
    ] = Engine.PYCOCOTOOLS

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunOptions.check(self)
        ENGINES.require(self.engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(ClipNames, TrackOptions, EvalOptions, ExampleOptions):
    """One evaluation of a run."""

    data: Data
    protocol: Annotated[
        str | None,
        Option(
            "Default: the protocol that the run was trained with. zero-shot: all classes of --data, by their names "
            "alone, as hdovd transfer does it."
        ),
    ] = None
    before: Annotated[
        Path | None,
        Option(
            "The run that RUN was adapted from: a table of AP50 before and after alone, of the classes that --data "
            "knows (docs/ADAPT.md)."
        ),
    ] = None
    pictures: Annotated[int, Option("Draw the detections of this many validation images.", min=0)] = 0
    per_class: Annotated[bool, Option("Print the table of all classes.")] = False
    errors: Annotated[
        bool, Option("Print what keeps AP50 from 100: errors by kind, novel and base apart (docs/ERRORS.md).")
    ] = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        EvalOptions.check(self)
        ExampleOptions.check(self)
        TrackOptions.check(self)
        if self.before is not None and (self.examples is not None or self.protocol is not None):
            raise HdovdError("--before compares runs by all their classes: leave --examples and --protocol out")
        if self.examples is not None and self.protocol is not None:
            raise HdovdError("--examples stand for classes that the run was trained for: leave --protocol out")
        if self.protocol not in (None, ZERO_SHOT):
            load_protocol(self.protocol)
        self.data.locate("val2017")
