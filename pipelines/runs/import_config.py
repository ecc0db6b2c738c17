"""What `hdovd import-checkpoint` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.core.errors import HdovdError, require_files
from hdovd.data.protocol import load_protocol
from hdovd.modeling.published_weights import PUBLISHED
from hdovd.pipelines.runs.folder import RunFolder


@dataclass(frozen=True, slots=True)
class ImportCheckpointConfig:
    """`class_embeddings`: a .pt of (C, D) rows in the protocol's order. `object_embedding`: a .pt of (1, D), for AdaMixer.

    `settings`: laid over the detector's recipe.
    """

    file: Path
    out: Path
    detector: str
    class_embeddings: Path | None = None
    object_embedding: Path | None = None
    protocol: str = "ov-coco"
    settings: tuple[str, ...] = ()
    overwrite: bool = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.detector not in PUBLISHED:
            raise HdovdError(f"--detector {self.detector}: expected {' or '.join(PUBLISHED)}, those that the authors published weights of")
        if not self.overwrite:
            RunFolder.require_none(self.out)
        load_protocol(self.protocol)
        if not self.file.is_file():
            raise HdovdError(f"{self.file}: no such file")
        require_files(class_embeddings=self.class_embeddings, object_embedding=self.object_embedding)
