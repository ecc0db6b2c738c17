"""What `hdovd detect` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, require_files
from hdovd.pipelines.common.name_list import names_asked
from hdovd.pipelines.common.options import ClipOptions, InferenceOptions, Option, require_own_folder
from hdovd.pipelines.evaluation.config import SHOWN_SCORE
from hdovd.pipelines.runs import ExampleOptions
from hdovd.pipelines.teachers.base import read_templates

DETECTIONS_MARKER = ".hdovd-detect"  # a folder that holds it is of detections, and may be overwritten


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectConfig(ClipOptions, InferenceOptions, ExampleOptions):
    """What to look for in which pictures. `classes` None: those of `examples`, or else of the run's protocol.
    `templates`: None for those of the run.
    """

    images: Annotated[
        tuple[str, ...],
        Option(
            "Pictures and videos: files; folders, with their folders; quoted patterns such as 'photos/**/*.jpg'; - for "
            "standard input: paths, one a line, or the bytes of one picture; rtsp://... and other addresses of "
            "streams; or camera:0.",
            argument=True,
        ),
    ]
    out: Annotated[Path, Option("The folder to write: detections.json, images.json, pictures/, videos/.")]
    classes: Annotated[
        tuple[str, ...] | None,
        Option(
            'What to look for: "umbrella, red kite, dog", or @FILE with one name a line (@general: the 1,447 names that ship). Default: the '  # noqa: E501
            "classes of the run's protocol, or of --examples.",
            parse=names_asked,
        ),
    ] = None
    threshold: Annotated[
        float, Option("What scores above it is written and drawn; hdovd eval goes down to the recipe's, mostly 0.05.")
    ] = SHOWN_SCORE
    class_embeddings: Annotated[
        Path | None,
        Option(
            "A row for each name, in order, of the run's CLIP, which is not needed then. One array "
            "in .npy, .safetensors, .pt."
        ),
    ] = None
    templates: Annotated[
        tuple[str, ...] | None,
        Option(
            "Other prompts than those of the run: photo, vild, clip80, or a file, one a line.", parse=read_templates
        ),
    ] = None
    batch_size: Annotated[int, Option("Pictures, or frames of a video, at a time.", min=1)] = 8
    every: Annotated[int, Option("Of videos, look at every N-th frame, and write these alone.", min=1)] = 1
    pictures: Annotated[bool, Option("Draw nothing.")] = True
    split_blind: Annotated[
        bool,
        Option(
            "Score all names alike. Without it a name of a base class of the run, in capitals or not, is scored "
            "as one, and any other name as novel: see docs/METHOD.md, section 7."
        ),
    ] = False
    overwrite: Annotated[bool, Option("Replace the detections that are in --out.")] = False
    alone: Annotated[
        bool,
        Option(
            "Let the names compete with each other alone. Without it the run's other base classes compete too, so that "
            "a person is not called a dog where only dogs are asked for."
        ),
    ] = False

    def __post_init__(self) -> None:
        ClipOptions.__post_init__(self)
        if not 0 <= self.threshold < 1:
            raise HdovdError(f"--threshold {self.threshold}: expected a score of at least 0 and below 1")
        if self.class_embeddings is not None and self.examples is not None:
            raise HdovdError("--examples and --class-embeddings both say what stands for a name: give one of them")
        if self.class_embeddings is not None and (self.clip is not None or self.templates is not None):
            raise HdovdError(
                "--clip and --templates have no use with --class-embeddings, which takes the place of both"
            )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        if require_own_folder(self.out, DETECTIONS_MARKER, "detections") and not self.overwrite:
            raise HdovdError(f"--out {self.out} holds detections: give another one, or --overwrite")
        ExampleOptions.check(self)
        require_files(class_embeddings=self.class_embeddings)
