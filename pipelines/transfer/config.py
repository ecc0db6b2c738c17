"""What `hdovd transfer` is asked for. Imports no torch: a mistake shows before that."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from hdovd.core import HdovdError, shorten
from hdovd.data import DataPaths
from hdovd.pipelines.common.options import ClipOptions, Group, Option
from hdovd.pipelines.evaluation.config import EvalOptions

FOLDERS: dict[str, tuple[Any, Any, Option]] = {
    "folders": (list[Path] | None, None, Option("Folders of data sets, as for --data of hdovd eval.", argument=True)),
    "data": (list[Path] | None, None, Option("The same: RUN --data A B C.")),
}


def folders_of(given: dict[str, Any]) -> tuple[Path, ...]:
    return (*(given["data"] or ()), *(given["folders"] or ()))


def data_name(data: Path) -> str:
    """What results on a data set are kept by: the name of its folder or file. Raises HdovdError if it has none."""
    name = os.path.basename(os.path.abspath(data))
    if not name:
        raise HdovdError(f"{data} has no name to keep results by: give a link to it")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig(ClipOptions, EvalOptions):
    """Data sets to evaluate a run on by the names of their classes."""

    data: Annotated[tuple[Path, ...], Group(FOLDERS, folders_of)]

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, or a run that needs to be trusted."""
        EvalOptions.check(self)
        names = [data_name(folder) for folder in self.data]
        if not names:
            raise HdovdError("no data sets: give their folders")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise HdovdError(
                f"several data sets of the name {shorten(list(twice))}, by which results are kept: give links of other "
                "names"
            )
        for folder in self.data:
            DataPaths(folder).locate("val2017")
