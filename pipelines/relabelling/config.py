"""What `hdovd relabel` is asked for. Imports no torch: a mistake shows before that."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import SET_NAME_TOLD, is_set_name
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import (
    CacheWritten,
    ClipOptions,
    DataIfGiven,
    Option,
    OtherProtocol,
    require_proposal_file,
)
from hdovd.pipelines.runs import UPPER_BOUND, RunFolder, RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RelabelConfig(ClipOptions, RunOptions):
    """The next round of pseudo boxes. `features`: the new set, None for the name of the run's with its round. `out`:
    None for a file in the run's folder. `clip`, `pretrained`, `data`, `protocol`: None for what the run's set was made
    from.
    """

    cache: CacheWritten
    features: Annotated[
        str | None, Option("Name of the new set of features. Default: that of the run's set, with -round2 behind it.")
    ] = None
    out: Annotated[
        Path | None,
        Option("The proposal file to write, verdicts beside it. Default: relabelled.json in the run's folder."),
    ] = None
    data: DataIfGiven = None
    protocol: OtherProtocol = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, and for a run that saw novel boxes."""
        require_proposal_file(self.proposals)
        if self.features is not None and not is_set_name(self.features):
            raise HdovdError(f"--features {self.features[:100]!r}: expected {SET_NAME_TOLD}")
        if RunFolder.open(self.run, trusted=self.trust).saw_novel:
            raise HdovdError(
                f"{self.run} is an oracle, which saw boxes of novel classes: pseudo boxes of it would be "
                f"annotations, and what is trained from them {UPPER_BOUND}"
            )

    @property
    def proposals(self) -> Path:
        return self.out or self.run / "relabelled.json"

    @property
    def verdicts(self) -> Path:
        return self.proposals.with_name(f"{self.proposals.stem}.verdicts.jsonl")


def next_round(features: str) -> tuple[str, int]:
    """The name of the set after one of that name, and its round: `default` is followed by `default-round2`."""
    name, number = re.fullmatch(r"(.*?)(?:-round(\d+))?", features).groups()  # type: ignore[union-attr]
    return f"{name}-round{int(number or 1) + 1}", int(number or 1) + 1
