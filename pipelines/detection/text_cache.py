"""Text embeddings of names that were asked for before, in the user's cache folder, so that CLIP need not be loaded for them again.

A folder for every way to embed (CLIP, precision, prompts, tokenizer), in it a file a name. Called by `name_embedding`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hdovd.cache.identity import KeyInputs, key_of
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.atomic_write import replace_file


class TextCache:
    """Rows (D,) float16 by name, of one way to embed. A folder that cannot be used is told of, and never an error."""

    def __init__(self, root: Path, inputs: KeyInputs, dim: int, log: Callable[[str], None]) -> None:
        """inputs: all that determines a row but the name."""
        self.folder, self._dim, self._log = root / "texts" / key_of(inputs), dim, log

    def get(self, name: str) -> np.ndarray | None:
        """None if it is not there, or damaged, which is told."""
        file = self._file(name)
        try:
            with safe_open(file, "np") as stored:
                row, about = np.asarray(stored.get_tensor("embedding")), stored.metadata() or {}
        except FileNotFoundError:
            return None
        except Exception as error:  # safetensors and the file system have errors of their own
            self._log(f"note: {file} is damaged ({error}): {name} is embedded anew")
            return None
        if about != _about(name, row) or row.shape != (self._dim,) or row.dtype != np.float16:
            self._log(f"note: {file} is damaged (its content is not what it says): {name} is embedded anew")
            return None
        return row

    def put(self, name: str, row: np.ndarray) -> bool:
        """(D,) float16. False, and told, if it cannot be kept."""
        file = self._file(name)
        try:
            replace_file(file, lambda partial: save_file({"embedding": row}, partial, _about(name, row)), writer=str(os.getpid()))
        except HdovdError as error:
            self._log(f"note: text embeddings are not kept for the next time ({error})")
            return False
        return True

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def _about(name: str, row: np.ndarray) -> dict[str, str]:
    return {"name": name, "sha256": hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()}
