"""What extraction asks of a frozen model: CLIP is one (`openclip`), and any other can be (docs/EXTENDING.md); the kinds
that a command can name, and the activations of CLIP's transformers. Imports no torch, for the sake of --help.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from hdovd.core.registry import Registry
from hdovd.pipelines.teachers.prompts import Name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

OPEN_CLIP = "open_clip"
# Functions that take what `openclip.load_clip` takes, and return a `Teacher`.
TEACHERS = Registry("--teacher", {OPEN_CLIP: "hdovd.pipelines.teachers.openclip:load_clip"})


class Activation(StrEnum):
    AUTO = "auto"
    GELU = "gelu"
    QUICK_GELU = "quickgelu"


class Teacher(Protocol):
    """Embeds pictures and names. n pictures or texts, D embedding size.

    `identity`: what determines the answers, preprocessing aside; JSON values. `notes`: what a user should read.
    `made_with`: what a user may want to know later, of no weight in the identity. It may also have a `temperature`, of
    its softmax over cosines: 1 / the logit scale, 0.01 without.
    """

    dim: int
    device: torch.device
    identity: dict[str, Any]
    notes: Sequence[str] = ()
    made_with: dict[str, Any] = {}  # noqa: RUF012  # nothing adds to it

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""

    @property
    def fit(self) -> Callable[[Tensor], Tensor]:
        """Resizes a picture, (3, h, w) uint8 -> (3, *input_size) uint8; called in worker processes."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What of it determines embeddings, as JSON values: a part of the identity of pictures."""

    def embed_images(self, pixels: Tensor) -> np.ndarray:
        """(n, 3, *input_size) uint8 -> (n, D) float32, L2-normalised. Called by several threads at once."""

    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        """Names -> (n, D) float32, L2-normalised: the mean over templates and over a row's names (METHOD section 2)."""

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        """A hash of what the text tower is given for every prompt: the tokenizer's part of the identity."""

    def prompt_notes(self, names: Sequence[Name], templates: Sequence[str]) -> list[str]:
        """What the user should know of the prompts: which are too long for the text tower."""
        return []

    def best_batch(self) -> int:
        """How many pictures to embed at a time, found out on the device."""
        return 64

    def peak_memory_bytes(self) -> int | None:
        """The most GPU memory that was in use, or None without a GPU."""
        return None
