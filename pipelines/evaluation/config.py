"""What `hdovd eval` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.data.coco import DataPaths
from hdovd.data.protocol import load_protocol
from hdovd.evaluation.engines import Engine
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.weights import Weights

SHOWN_SCORE = 0.3  # detections of this score or more are drawn


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """`protocol` None: that of the run. `workers` None: what suits the device. `pictures`: how many validation images to draw.

    `weights`: of the last epoch, or of the one with the best validation AP50 of base classes. `trust`: as `RunFolder.trusted`.
    """

    run: Path
    data: DataPaths
    protocol: str | None = None
    device: str = "auto"
    batch_size: int = 16
    workers: int | None = None
    pictures: int = 0
    engine: Engine = Engine.PYCOCOTOOLS
    weights: Weights = Weights.LAST
    trust: bool = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunFolder.open(self.run, trusted=self.trust).recipe()
        if self.protocol is not None:
            load_protocol(self.protocol)
        self.data.locate("val2017")
