"""What extraction asks of a frozen model: CLIP is one (`clip_teacher`); benchmarks and Ray workers bring their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from hdovd.pipelines.prompt_templates import Name


class Teacher(Protocol):
    """Embeds pictures and names. n pictures or texts, D embedding size, s input side.

    `preprocess`: an RGB picture -> (3, s, s); called in worker processes. `identity`: what determines the answers,
    preprocessing aside; JSON values. `notes`: what a user should read. `made_with`: what a user may want to know later, of
    no weight in the identity.
    """

    dim: int
    preprocess: Callable[[Image.Image], Tensor]
    identity: dict[str, Any]
    preprocessing: dict[str, Any]
    notes: Sequence[str]
    made_with: dict[str, Any]

    def embed_images(self, pixels: Tensor) -> np.ndarray:
        """(n, 3, s, s) -> (n, D) float32, L2-normalised."""
        ...

    def embed_names(self, names: Sequence[Name], templates: Sequence[str]) -> np.ndarray:
        """Names -> (n, D) float32, L2-normalised: the mean over templates and over a row's names (METHOD section 2)."""
        ...

    def hash_prompts(self, names: Sequence[Name], templates: Sequence[str]) -> str:
        """A hash of what the text tower is given for every prompt: the tokenizer's part of the identity."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """The most GPU memory that was in use, or None without a GPU."""
        ...
