"""What `hdovd import-checkpoint` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.core.errors import HdovdError, require_files
from hdovd.data.protocol import load_protocol
from hdovd.modeling.published_weights import PUBLISHED
from hdovd.pipelines.common.options import Option, Protocol
from hdovd.pipelines.runs.folder import RunFolder

PublishedDetector = StrEnum("PublishedDetector", {name.upper(): name for name in PUBLISHED})  # type: ignore[misc]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCheckpointConfig:
    """A published checkpoint that becomes a run. `settings`: laid over the detector's recipe."""

    file: Annotated[Path, Option("A checkpoint of the authors' code, .pth.", argument=True)]
    out: Annotated[Path, Option("The run folder to write.")]
    detector: Annotated[PublishedDetector, Option("Which detector the checkpoint is of.")]
    class_embeddings: Annotated[
        Path | None,
        Option("Text embeddings of the classes, .pt: a row a class in the protocol's order, 65 x 512 for ov-coco."),
    ] = None
    object_embedding: Annotated[Path | None, Option('adamixer: the text embedding of "object", .pt, 1 x 512.')] = None
    protocol: Protocol = "ov-coco"
    settings: Annotated[
        tuple[str, ...], Option("A value of the detector's recipe, KEY=VALUE. Repeatable.", flags=("--set",))
    ] = ()
    overwrite: Annotated[bool, Option("Replace the run that is there.")] = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.detector not in PUBLISHED:
            raise HdovdError(
                f"--detector {self.detector}: expected {' or '.join(PUBLISHED)}, those that the authors published "
                f"weights of"
            )
        if not self.overwrite:
            RunFolder.require_none(self.out)
        load_protocol(self.protocol)
        if not self.file.is_file():
            raise HdovdError(f"{self.file}: no such file")
        require_files(class_embeddings=self.class_embeddings, object_embedding=self.object_embedding)
