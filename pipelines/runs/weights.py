"""Which weights of a run to evaluate, and which they are. Imports nothing heavy, for the sake of --help."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.pipelines.common.options import Option


class Weights(StrEnum):
    """Which of a run's weights."""

    LAST = "last"
    BEST = "best"

    @property
    def file(self) -> str:
        return "model.safetensors" if self is Weights.LAST else "best.safetensors"


WeightsOption = Annotated[
    Weights, Option("Of the last epoch, or of the one with the best validation AP50 of base classes.")
]


def weights_hash(file: Path) -> str:
    """What tells the weights in a file from others: the start of its SHA-256."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:24]
