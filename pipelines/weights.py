"""Which weights of a run to evaluate. Imports nothing, for the sake of --help."""

from enum import StrEnum


class Weights(StrEnum):
    """Which of a run's weights."""

    LAST = "last"
    BEST = "best"

    @property
    def file(self) -> str:
        return "model.safetensors" if self is Weights.LAST else "best.safetensors"
