"""What `hdovd propose` is asked for: validated, and read without torch, for the sake of --help."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.options import RECIPE, VALIDATION, Data, Device, Option, Protocol, SaveMinutes
from hdovd.pipelines.proposal_files.options import require_form

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


class Detector(StrEnum):
    """What finds proposals: the object localisation network, or a plain region proposal network."""

    OLN = "oln"
    RPN = "rpn"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """A network to train on the base boxes of `data`, kept in `file`; one that is there already, of the same settings,
    is taken.

    `overwrite`: train anew, whatever is there. `save_minutes`: between two checkpoints within an epoch.
    """

    data: DataPaths
    file: Path
    detector: Detector
    recipe: Recipe
    protocol: str = "ov-coco"
    overwrite: bool = False
    save_minutes: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeConfig:
    """`top` proposals an image at most, of `min_score` or more, both sides at least `min_side` pixels of the original
    image.

    A proposal that overlaps a base box or a better proposal by an IoU of more than `overlap` is left out.
    `checkpoint`: a trained network, of which the values are its own; of `recipe` batch size and workers are taken.
    `backbone_out`: where to keep the trained backbone, a start for detectors where ImageNet weights do not fit.
    """

    data: DataPaths
    out: Path
    recipe: Recipe
    protocol: str = "ov-coco"
    top: int = 10
    overlap: float = 0.5
    min_side: float = 8.0
    min_score: float = 0.0
    device: str = "auto"
    backbone_out: Path | None = None
    detector: Detector = Detector.OLN
    checkpoint: Path | None = None
    overwrite: bool = False
    save_minutes: float = 10.0

    @property
    def network(self) -> NetworkConfig:
        """The network of this job lies beside its proposals."""
        return NetworkConfig(
            data=self.data,
            file=network_file(self.out, self.detector),
            detector=self.detector,
            recipe=self.recipe,
            protocol=self.protocol,
            overwrite=self.overwrite,
            save_minutes=self.save_minutes,
        )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        self.data.locate("train2017")
        if self.checkpoint is not None:
            require_network(self.checkpoint)

    def selection(self) -> dict[str, float]:
        return {"top": self.top, "overlap": self.overlap, "min_side": self.min_side, "min_score": self.min_score}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallConfig:
    """Average recall on `validation` of networks side by side: those in `checkpoints`, and those of `detectors`, which
    lie beside `out` or are trained on `data`.
    """

    data: DataPaths
    validation: DataPaths | None
    recipe: Recipe
    out: Path | None = None
    protocol: str = "ov-coco"
    detectors: tuple[Detector, ...] = ()
    checkpoints: tuple[Path, ...] = ()
    device: str = "auto"
    overwrite: bool = False
    save_minutes: float = 10.0

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.validation is None:
            raise HdovdError(
                "--report counts on validation pictures: there is no val2017 under --data; give --val-images and "
                "--val-annotations"
            )
        if self.networks():
            self.data.locate("train2017")
        load_protocol(self.protocol)
        self.validation.locate("val2017")
        for file in self.checkpoints:
            require_network(file)

    def networks(self) -> list[NetworkConfig]:
        """What is to be trained, or was. Raises HdovdError without a place for it."""
        wanted = self.detectors if self.detectors or self.checkpoints else (Detector.OLN,)
        if wanted and self.out is None:
            raise HdovdError(
                f"--report trains {' and '.join(wanted)}, and keeps the networks beside --out FILE, for proposals "
                f"later: give --out, or trained networks with --checkpoint"
            )
        if self.out is not None:
            require_form(self.out)
        return [
            NetworkConfig(
                data=self.data,
                file=network_file(self.out, detector),
                detector=detector,
                recipe=self.recipe,
                protocol=self.protocol,
                overwrite=self.overwrite,
                save_minutes=self.save_minutes,
            )
            for detector in dict.fromkeys(wanted)
            if self.out is not None
        ]


def require_network(file: Path) -> None:
    """Raises HdovdError if there is no such file."""
    if not file.is_file():
        raise HdovdError(f"no file {file}: expected a network that hdovd propose trained (NAME.oln.safetensors)")


def network_file(out: Path, detector: Detector) -> Path:
    """Where the network of a proposal file lies: proposals.json has its OLN in proposals.oln.safetensors."""
    return out.with_name(f"{out.stem}.{detector.value}.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeOptions:
    """What `hdovd propose` is asked for, of which a `ProposeConfig` or, with `report`, a `RecallConfig` follows."""

    data: Data
    recipe: Annotated[Recipe, RECIPE]
    out: Annotated[
        Path | None, Option("The proposal file to write: COCO results JSON, or .npz. The network lies beside it.")
    ] = None
    protocol: Protocol = "ov-coco"
    detector: Annotated[
        tuple[Detector, ...],
        Option(
            "oln (the default): an object localisation network, which knows no background; rpn: a "
            "plain region proposal network, its baseline. Repeatable with --report."
        ),
    ] = ()
    checkpoint: Annotated[
        tuple[Path, ...],
        Option(
            "A network that propose trained, NAME.oln.safetensors: propose with it, train nothing. "
            "Repeatable with --report."
        ),
    ] = ()
    report: Annotated[
        bool,
        Option(
            "Print the average recall on val2017 of these networks (trained where they are not there yet), base and "
            "novel; no proposals are written."
        ),
    ] = False
    top: Annotated[int, Option("Proposals an image, at most.", min=1)] = 10
    overlap: Annotated[
        float, Option("Largest IoU of a proposal with a base box or a better proposal.", min=0, max=1)
    ] = 0.5
    min_side: Annotated[float, Option("Shortest side of a proposal, pixels of the original image.", min=0)] = 8.0
    backbone_out: Annotated[
        Path | None, Option("Also keep the trained backbone and its record: hdovd train can start from it.")
    ] = None
    min_score: Annotated[float, Option("Lowest score of a proposal.", min=0, max=1)] = 0.0
    device: Device = "auto"
    overwrite: Annotated[bool, Option("Train anew, whatever network or checkpoint is there.")] = False
    save_minutes: SaveMinutes = 10.0
    validation: Annotated[DataPaths | None, VALIDATION] = None

    def config(self) -> ProposeConfig | RecallConfig:
        """Raises HdovdError without `out`, or for more than one network, where proposals are to be written."""
        if self.report:
            return RecallConfig(
                data=self.data,
                validation=self.validation,
                recipe=self.recipe,
                out=self.out,
                protocol=self.protocol,
                detectors=self.detector,
                checkpoints=self.checkpoint,
                device=self.device,
                overwrite=self.overwrite,
                save_minutes=self.save_minutes,
            )
        if self.out is None:
            raise HdovdError("--out FILE is missing: the proposal file to write (or --report, to count recall alone)")
        require_form(self.out)
        if len(self.detector) > 1 or len(self.checkpoint) > 1:
            raise HdovdError("one --detector or --checkpoint makes a proposal file; several are compared with --report")
        if self.detector and self.checkpoint:
            raise HdovdError("--checkpoint is a network of one kind already: leave --detector out")
        return ProposeConfig(
            data=self.data,
            out=self.out,
            recipe=self.recipe,
            protocol=self.protocol,
            top=self.top,
            overlap=self.overlap,
            min_side=self.min_side,
            min_score=self.min_score,
            device=self.device,
            backbone_out=self.backbone_out,
            detector=self.detector[0] if self.detector else Detector.OLN,
            checkpoint=self.checkpoint[0] if self.checkpoint else None,
            overwrite=self.overwrite,
            save_minutes=self.save_minutes,
        )
