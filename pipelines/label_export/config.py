"""What `hdovd export-labels` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError
from hdovd.pipelines.common.options import Option
from hdovd.pipelines.extraction.source import CacheSource

LabelForm = StrEnum(
    "LabelForm",
    {"FIFTYONE": "fiftyone", "LABEL_STUDIO": "label-studio", "CVAT": "cvat", "YOLO": "yolo", "COCO": "coco"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLabelsConfig(CacheSource):
    """Boxes with names and scores, of a set of a cache or of a file, and the form to write them in. `protocol`: of a
    cache."""

    cache: Annotated[
        Path | str,
        Option(
            "detections.json, of hdovd detect or eval; what hdovd search printed by --json or wrote by --coco; or a "
            "cache, for its pseudo boxes.",
            argument=True,
            metavar="SOURCE",
        ),
    ]
    to: Annotated[LabelForm, Option("The form.")]
    out: Annotated[Path, Option("The folder to write, new or empty.")]
    min_score: Annotated[
        float, Option("Boxes of at least this score alone; of caches and searches it is the cosine.")
    ] = -inf
    image_prefix: Annotated[
        str, Option("label-studio: what stands before the names of pictures, such as s3://bucket/folder/.")
    ] = "/data/local-files/?d="

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise HdovdError(f"--out {self.out} is there already: give a folder that is new or empty")
        if not Path(self.cache).is_file():
            if str(self.cache).endswith(".json"):
                raise HdovdError(f"no file {self.cache}: name what hdovd detect, eval or search wrote, or a cache")
            CacheSource.check(self)
