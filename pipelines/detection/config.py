"""What `hdovd detect` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.core.errors import HdovdError, require_files
from hdovd.pipelines.evaluation.config import SHOWN_SCORE
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.weights import Weights

DETECTIONS_MARKER = ".hdovd-detect"  # a folder that holds it is of detections, and may be overwritten


@dataclass(frozen=True, slots=True)
class DetectConfig:
    """`images`: words as in `picture_files.find_pictures`. `classes` None: those of the run's protocol. `threshold`: what is found
    scores above it. `class_embeddings`: a file with a row for each class, in order; CLIP is not needed then.

    `clip`, `pretrained`, `templates`: None for those of the run. `workers` None: what suits the device. `pictures`: draw them.
    `alone`: no base classes of the run compete with `classes` (`Detector.set_classes`). `trust`: as `RunFolder.trusted`.
    """

    run: Path
    images: tuple[str, ...]
    out: Path
    classes: tuple[str, ...] | None = None
    threshold: float = SHOWN_SCORE
    class_embeddings: Path | None = None
    clip: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] | None = None
    weights: Weights = Weights.LAST
    device: str = "auto"
    batch_size: int = 8
    workers: int | None = None
    pictures: bool = True
    split_blind: bool = False
    overwrite: bool = False
    alone: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise HdovdError(f"--threshold {self.threshold}: expected a score of at least 0 and below 1")
        if self.batch_size < 1:
            raise HdovdError(f"--batch-size {self.batch_size}: expected 1 or more")
        if self.class_embeddings is not None and (self.clip is not None or self.templates is not None):
            raise HdovdError("--clip and --templates have no use with --class-embeddings, which takes the place of both")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        _require_place(self.out, overwrite=self.overwrite)
        RunFolder.open(self.run, trusted=self.trust).recipe()
        require_files(class_embeddings=self.class_embeddings)


def _require_place(out: Path, *, overwrite: bool) -> None:
    """Raises HdovdError if something else than old detections, or these without `overwrite`, is there."""
    if out.exists() and not out.is_dir():
        raise HdovdError(f"--out {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / DETECTIONS_MARKER).is_file():
            raise HdovdError(f"--out {out} is not empty and holds no detections: give another one")
        if not overwrite:
            raise HdovdError(f"--out {out} holds detections: give another one, or --overwrite")
