"""Options of the commands that take a run: which weights, and examples of classes; and what `hdovd import-checkpoint`
is asked for. Imports no torch.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, require_files
from hdovd.data import load_protocol
from hdovd.modeling.published_weights import PUBLISHED
from hdovd.pipelines.common.options import Option, Protocol, Trust
from hdovd.pipelines.runs.folder import RunFolder, Weights

DEFAULT_MIX = 0.25  # the best of 0.25, 0.5, 0.75 and 1 on base classes (docs/RESULTS.md)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run to use. `trust`: as `RunFolder.trusted`."""

    run: Annotated[Path, Option("The run folder that hdovd train wrote, or hf://USER/NAME.", argument=True)]
    weights: Annotated[
        Weights, Option("Of the last epoch, or of the one with the best validation AP of base classes.")
    ] = Weights.LAST
    trust: Trust = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunFolder.open(self.run, trusted=self.trust).recipe()


@dataclass(frozen=True, kw_only=True)
class ExampleOptions(RunOptions):
    """A run, and examples of what it is to find."""

    examples: Annotated[
        Path | None,
        Option(
            "Pictures of what to look for: a folder with a subfolder of crops for each class, called by the class's "
            "name; or a COCO instances file, every box of which is an example."
        ),
    ] = None
    example_images: Annotated[Path | None, Option("The image folder of a COCO file of --examples.")] = None
    mix: Annotated[
        float, Option("How much examples count beside the name of their class: 0: the name alone; 1: examples alone.")
    ] = DEFAULT_MIX

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        RunOptions.check(self)
        path, there, where = self.examples or Path(), self.examples is not None, f"--examples {self.examples}"
        faults = {
            f"--mix {self.mix:g}: expected a number from 0 to 1": not 0 <= self.mix <= 1,
            "--example-images goes with --examples FILE.json": self.example_images and not there,
            f"{where}: no such file or folder": not path.exists(),
            f"{where} is a folder: --example-images is for a COCO file": self.example_images and path.is_dir(),
            f"{where}: expected a folder of crops, or FILE.json of COCO": path.is_file() and path.suffix != ".json",
        }
        if why := next((why for why, wrong in faults.items() if wrong), ""):
            raise HdovdError(why)


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
