"""What `hdovd report` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.pipelines.common.options import DATA, Group, InferenceOptions, Option, Trust, data_of, require_own_folder
from hdovd.pipelines.runs import RunFolder

REPORT_FILE = "index.html"


def _validation(given: dict[str, Any]) -> DataPaths | None:
    return data_of(given) if given["images"] or given["annotations"] else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(InferenceOptions):
    """A page about `runs`. `data`: where the pictures are; nothing given: where the first run's cache says that it was
    made from. `validation`: the validation images, if they are not val2017 of `data`. `trust`: as `RunFolder.trusted`,
    of all runs.
    """

    runs: Annotated[
        tuple[Path, ...],
        Option("Run folders that hdovd train wrote; several are set side by side.", argument=True, metavar="RUN..."),
    ]
    out: Annotated[Path, Option("Folder for the page, index.html.")] = Path("report")
    data: Annotated[DataPaths, Group(DATA, lambda given: DataPaths(given["data"], form=given["form"]))] = field(
        default_factory=DataPaths
    )
    validation: Annotated[DataPaths | None, Group({}, _validation)] = None
    gallery: Annotated[int, Option("How many validation images are shown, novel objects first.", min=0)] = 36
    pseudo: Annotated[int, Option("How many training images are shown with their pseudo boxes.", min=0)] = 12
    relation_images: Annotated[
        int,
        Option(
            "Training images in the batch of the relation matrices; 0 leaves them out.", min=0, flags=("--relations",)
        ),
    ] = 8
    threshold: Annotated[float, Option("Detections of this score or more are shown, and count in the confusion.")] = 0.3
    trust: Trust = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise HdovdError("a report needs a run: give the folders that hdovd train wrote")
        if not 0 <= self.threshold < 1:
            raise HdovdError(f"--threshold {self.threshold}: expected a score from 0 up to, not including, 1")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        if self.out.suffix == ".html":
            raise HdovdError(f"--out {self.out}: give a folder, in which {REPORT_FILE} is written")
        require_own_folder(self.out, REPORT_FILE, "report")
        for run in self.runs:
            RunFolder.open(run, trusted=self.trust)
        if (data := self.validation or self.data) != DataPaths():
            data.locate("val2017")
