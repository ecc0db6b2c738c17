"""What `hdovd propose` is asked for: validated, and read without torch, for the sake of --help."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hdovd.core import HdovdError
from hdovd.data import load_protocol
from hdovd.pipelines.common.options import RECIPE, DataOptions, Device, NetworkOptions, Option, require_proposal_file

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


class Detector(StrEnum):
    """What finds proposals: the object localisation network, or a plain region proposal network."""

    OLN = "oln"
    RPN = "rpn"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeConfig(NetworkOptions, DataOptions):
    """Proposals of the images of `data`, by one network; or with `report` the average recall on `validation` of several
    of them.

    A network lies beside `out`; one that is there already, of the same settings, is taken. `checkpoint`: a trained
    network, of which the values are its own; of `recipe` batch size and workers are taken.
    """

    recipe: Annotated[Recipe, RECIPE]
    out: Annotated[
        Path | None, Option("The proposal file to write: COCO results JSON, or .npz. The network lies beside it.")
    ] = None
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
            "Print the average recall on the validation images of these networks (trained where they are not there "
            "yet), base and novel; no proposals are written."
        ),
    ] = False
    top: Annotated[int | None, Option("Proposals an image, at most; default: chosen by base boxes.", min=1)] = None
    overlap: Annotated[
        float | None,
        Option(
            "Largest IoU of a proposal with a base box or a better proposal; default: chosen by base boxes.",
            min=0,
            max=1,
        ),
    ] = None
    min_side: Annotated[
        float | None,
        Option("Shortest side of a proposal, pixels of the original image; default: chosen by base boxes.", min=0),
    ] = None
    backbone_out: Annotated[
        Path | None, Option("Also keep the trained backbone and its record: hdovd train can start from it.")
    ] = None
    min_score: Annotated[
        float | None, Option("Lowest score of a proposal; default: chosen by base boxes.", min=0, max=1)
    ] = None
    no_rehearsal: Annotated[
        bool,
        Option(
            "Choose what is not given by classes that the network has learnt, without training a second one that has "
            "not."
        ),
    ] = False
    device: Device = "auto"
    overwrite: Annotated[bool, Option("Train anew, whatever network or checkpoint is there.")] = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        load_protocol(self.protocol)
        if self.out is not None:
            require_proposal_file(self.out)
        if self.report:
            self._check_report()
        elif self.out is None:
            raise HdovdError("--out FILE is missing: the proposal file to write (or --report, to count recall alone)")
        elif len(self.detector) > 1 or len(self.checkpoint) > 1:
            raise HdovdError("one --detector or --checkpoint makes a proposal file; several are compared with --report")
        elif self.detector and self.checkpoint:
            raise HdovdError("--checkpoint is a network of one kind already: leave --detector out")
        if self.trained or not self.report:
            self.data.locate("train2017")
        for file in self.checkpoint:
            if not file.is_file():
                raise HdovdError(f"no file {file}: expected a network of hdovd propose (NAME.oln.safetensors)")

    def _check_report(self) -> None:
        if self.validation is None:
            raise HdovdError(
                "--report counts on validation pictures: there are none under --data; give --val-images and "
                "--val-annotations"
            )
        self.validation.locate("val2017")
        if self.trained and self.out is None:
            raise HdovdError(
                f"--report trains {' and '.join(self.trained)}, and keeps the networks beside --out FILE, for "
                f"proposals later: give --out, or trained networks with --checkpoint"
            )

    @property
    def trained(self) -> tuple[Detector, ...]:
        """The kinds of network that are to be trained, or were: OLN unless something else is asked for."""
        return tuple(dict.fromkeys(self.detector if self.detector or self.checkpoint else (Detector.OLN,)))

    def beside(self, ending: str) -> Path:
        """A file that belongs to the proposals: proposals.json has its OLN in proposals.oln.safetensors."""
        assert self.out is not None  # as checked
        return self.out.with_name(f"{self.out.stem}.{ending}")

    def selection(self) -> dict[str, float]:
        """What is given of what is kept of what a network finds; the rest is chosen (`propose.choose`)."""
        given = {"top": self.top, "overlap": self.overlap, "min_side": self.min_side, "min_score": self.min_score}
        return {name: value for name, value in given.items() if value is not None}
