"""What `hdovd report` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from hdovd.core.errors import HdovdError, refuse, shorten
from hdovd.data.coco import DataPaths
from hdovd.pipelines.common.options import DATA, Group, InferenceOptions, Option, Trust, data_of, require_own_folder
from hdovd.pipelines.runs.listing import find_runs

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
        refuse(
            {
                "a report needs a run: give the folders that hdovd train wrote": not self.runs,
                f"--threshold {self.threshold}: expected a score from 0 up to, not including, 1": (
                    not 0 <= self.threshold < 1
                ),
            }
        )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        if self.out.suffix == ".html":
            raise HdovdError(f"--out {self.out}: give a folder, in which {REPORT_FILE} is written")
        require_own_folder(self.out, REPORT_FILE, "report")
        for run in self.runs:
            _require_run(run)
        if (data := self.validation or self.data) != DataPaths():
            data.locate("val2017")


def _require_run(path: Path) -> None:
    """Raises HdovdError, naming runs that are near, for a folder that is none."""
    if (path / "run.json").is_file():
        return
    inside = [str(run) for run in find_runs([path])] if path.is_dir() else []
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = [f"; did you mean {path.parent / name}?" for name in get_close_matches(path.name, beside, 1)]
    hint = f"; there are runs in it: {shorten(list(inside))}" if inside else "".join(near)
    raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote{hint}")
