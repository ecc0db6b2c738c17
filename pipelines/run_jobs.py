"""What is asked of finished runs: `hdovd eval`, `detect`, `export`, `report`. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from hdovd.ap_engine import Engine
from hdovd.coco import DataPaths
from hdovd.errors import HdovdError, require_files, shorten
from hdovd.pipelines.model_form import ModelForm
from hdovd.pipelines.run_folder import FILES, RunFolder
from hdovd.pipelines.runs import find_runs
from hdovd.pipelines.weights import Weights
from hdovd.protocol import load_protocol

SHOWN_SCORE = 0.3  # detections of this score or more are drawn
REPORT_FILE = "index.html"
DETECTIONS_MARKER = ".hdovd-detect"  # a folder that holds it is of detections, and may be overwritten


@dataclass(frozen=True, slots=True)
class EvalJob:
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


@dataclass(frozen=True, slots=True)
class DetectJob:
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


@dataclass(frozen=True, slots=True)
class ExportModelJob:
    """`check_images`: pictures to check the file on, besides those that are made up. `trust`: as `RunFolder.trusted`."""

    run: Path
    form: ModelForm
    out: Path
    weights: Weights = Weights.LAST
    check_images: tuple[Path, ...] = ()
    trust: bool = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        run = RunFolder.open(self.run, trusted=self.trust)
        run.recipe()
        if self.out.is_dir() or (self.out.name in FILES and self.out.resolve().parent == run.path.resolve()):
            raise HdovdError(f"--out {self.out} is {'a folder' if self.out.is_dir() else 'a file of the run itself'}: expected the name of "
                             f"a new file, such as detector.{self.form.value}")
        if not self.out.resolve().parent.is_dir():
            raise HdovdError(f"--out {self.out}: there is no folder {self.out.resolve().parent}")
        for picture in self.check_images:
            require_files(check_image=picture)


@dataclass(frozen=True, slots=True)
class ReportJob:
    """`data`: where the pictures are; nothing given: where the first run's cache says that it was made from. `gallery`, `pseudo`: how many
    validation and training images are shown. `relation_images`: in the batch of the relation matrices; 0 leaves them out. `threshold`:
    scores from which a detection is shown and counts in the confusion. `validation`: the validation images, if they are not val2017 of
    `data`. `batch_size`, `workers`: of the evaluation of runs that have none yet. `trust`: as `RunFolder.trusted`, of all of them."""

    runs: tuple[Path, ...]
    out: Path
    data: DataPaths = field(default_factory=DataPaths)
    validation: DataPaths | None = None
    gallery: int = 36
    pseudo: int = 12
    relation_images: int = 8
    threshold: float = 0.3
    device: str = "auto"
    batch_size: int = 16
    workers: int | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise HdovdError("a report needs a run: give the folders that hdovd train wrote")
        if not 0 <= self.threshold < 1:
            raise HdovdError(f"--threshold {self.threshold}: expected a score from 0 up to, not including, 1")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        _require_room(self.out)
        for run in self.runs:
            _require_run(run)
        if (data := self.validation or self.data) != DataPaths():
            data.locate("val2017")


def _require_room(out: Path) -> None:
    """Raises HdovdError for a file, or a folder that holds other things than a report."""
    if out.is_file() or out.suffix == ".html":
        raise HdovdError(f"--out {out} is a file: give a folder, in which {REPORT_FILE} is written")
    if out.is_dir() and not (out / REPORT_FILE).is_file() and (others := sorted(entry.name for entry in out.iterdir())):
        raise HdovdError(f"--out {out} holds other things ({shorten(list(others))}): give a folder that is new, empty, or a report's")


def _require_run(path: Path) -> None:
    """Raises HdovdError, naming runs that are near, for a folder that is none."""
    if (path / "run.json").is_file():
        return
    inside = [str(run) for run in find_runs([path])] if path.is_dir() else []
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], 1) if path.parent.is_dir() else []
    hint = f"; there are runs in it: {shorten(list(inside))}" if inside else f"; did you mean {path.parent / near[0]}?" if near else ""
    raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote{hint}")


def _require_place(out: Path, *, overwrite: bool) -> None:
    """Raises HdovdError if something else than old detections, or these without `overwrite`, is there."""
    if out.exists() and not out.is_dir():
        raise HdovdError(f"--out {out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / DETECTIONS_MARKER).is_file():
            raise HdovdError(f"--out {out} is not empty and holds no detections: give another one")
        if not overwrite:
            raise HdovdError(f"--out {out} holds detections: give another one, or --overwrite")
