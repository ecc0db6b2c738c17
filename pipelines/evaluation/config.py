"""What `hdovd eval` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from typing import Annotated

from hdovd.core.errors import HdovdError
from hdovd.data.protocol import load_protocol
from hdovd.evaluation.engines import ENGINES, Engine
from hdovd.pipelines.common.options import (
    DEFAULT_MIX,
    Data,
    Device,
    ExampleImages,
    Examples,
    Mix,
    Option,
    Run,
    Trust,
    check_examples,
    workers_option,
)
from hdovd.pipelines.runs.folder import RunFolder, Weights, WeightsOption

ZERO_SHOT = "zero-shot"  # the protocol of data sets that the run was not trained on: all classes are novel
ImagesABatch = Annotated[int, Option("Images a batch.", min=1)]
DecodingWorkers = Annotated[
    int | None, workers_option("Processes that decode images, or auto: none on a CPU, up to 16 for a GPU.")
]
ApEngine = Annotated[
    str,
    Option(
        "What counts AP: pycocotools; faster-coco-eval, which gives the same sooner and comes with hdovd's extra "
        "fast-eval; or my_module:engine, a function that returns classes with their interface."
    ),
]
SHOWN_SCORE = 0.3  # detections of this score or more are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """One evaluation of a run. `trust`: as `RunFolder.trusted`."""

    run: Run
    data: Data
    protocol: Annotated[
        str | None,
        Option(
            "Default: the protocol that the run was trained with. zero-shot: all classes of --data, by their names "
            "alone, as hdovd transfer does it."
        ),
    ] = None
    examples: Examples = None
    example_images: ExampleImages = None
    mix: Mix = DEFAULT_MIX
    device: Device = "auto"
    batch_size: ImagesABatch = 16
    workers: DecodingWorkers = None
    pictures: Annotated[int, Option("Draw the detections of this many validation images.", min=0)] = 0
    per_class: Annotated[bool, Option("Print the table of all classes.")] = False
    errors: Annotated[
        bool, Option("Print what keeps AP50 from 100: errors by kind, novel and base apart (docs/ERRORS.md).")
    ] = False
    engine: ApEngine = Engine.PYCOCOTOOLS
    weights: WeightsOption = Weights.LAST
    trust: Trust = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunFolder.open(self.run, trusted=self.trust).recipe()
        check_examples(self.examples, self.example_images, self.mix)
        if self.examples is not None and self.protocol is not None:
            raise HdovdError("--examples stand for classes that the run was trained for: leave --protocol out")
        if self.protocol not in (None, ZERO_SHOT):
            load_protocol(self.protocol)
        ENGINES.require(self.engine)
        self.data.locate("val2017")
