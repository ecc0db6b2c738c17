"""The runs that a report is about: opened, named, checked to be of one kind."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdovd.core.errors import HdovdError
from hdovd.core.log import quiet
from hdovd.data.coco import DataPaths
from hdovd.data.protocol import Protocol
from hdovd.evaluation.groups import group_of
from hdovd.pipelines.evaluation.analysis import RunAnalysis, analyse
from hdovd.pipelines.extraction.source import data_of_cache
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.listing import Run, read_run


@dataclass(frozen=True, slots=True)
class OneRun:
    """A run by the name that the report calls it by. `entries`: its log. `notes`: what a reader should know of it."""

    name: str
    folder: RunFolder
    run: Run
    analysis: RunAnalysis
    entries: list[dict[str, Any]]
    notes: tuple[str, ...]


def open_runs(folders: Sequence[RunFolder], validation: DataPaths, threshold: float) -> list[OneRun]:
    """Raises HdovdError if two runs are of different protocols or validation images, or one is given twice."""
    resolved = [folder.path.resolve() for folder in folders]
    if twice := [
        str(folder.path) for folder, where in zip(folders, resolved, strict=True) if resolved.count(where) > 1
    ]:
        raise HdovdError(f"{twice[0]} is given twice")
    runs: list[OneRun] = []
    for name, folder in zip(names_of(resolved), folders, strict=True):
        run = read_run(folder.path)
        with quiet(bool(runs)):  # they are all of the same pictures
            analysis = analyse(folder.path, validation, confusion_score=threshold, trust=folder.trusted)
        notes = [f"{name}: {reason}" for reason in run.wrong]
        try:
            entries = folder.entries()
        except HdovdError as error:
            notes.append(f"{name}: {error}; its losses are left out")
            entries = []
        if run.epochs is not None and run.epochs_done < run.epochs:
            notes.append(f"{name} has done {run.epochs_done} of its {run.epochs} epochs")
        runs.append(OneRun(name, folder, run, analysis, entries, tuple(notes)))
        _require_same(runs[0], runs[-1])
    return runs


def names_of(paths: Sequence[Path]) -> list[str]:
    """What each path has of its own, beneath the folder that all lie in; of one alone its last part."""
    if len(paths) == 1:
        return [paths[0].name]
    common = Path(os.path.commonpath(paths))
    return [str(path.relative_to(common)) if path != common else path.name for path in paths]


def data_of(runs: Sequence[RunFolder], given: DataPaths, *, needed: bool = True) -> DataPaths:
    """`given`, or what the cache of the first run that knows it was made from; HdovdError if none does, and it is
    `needed`.
    """
    if given != DataPaths():
        return given
    reasons = []
    for run in runs:
        try:
            return data_of_cache(run)
        except HdovdError as error:
            reasons.append(str(error))
    if not needed:
        return given
    raise HdovdError(
        "where are the pictures? Give --data ROOT, or --images and --annotations; the runs do not tell: "
        + "; ".join(reasons)
    )


def novel_first(protocol: Protocol) -> list[int]:
    """Labels of the classes in the order that the whole report has."""
    return sorted(range(len(protocol.names)), key=lambda label: group_of(label, protocol) == "base")


def _require_same(first: OneRun, other: OneRun) -> None:
    a, b = first.analysis, other.analysis
    if (a.protocol.base, a.protocol.novel) != (b.protocol.base, b.protocol.novel):
        raise HdovdError(
            f"{first.name} was evaluated by protocol {a.protocol.name} and {other.name} by {b.protocol.name}: their AP "
            f"does not compare; make a report of each"
        )
    if [image.id for image in a.split.images] != [image.id for image in b.split.images]:
        raise HdovdError(
            f"{first.name} and {other.name} were evaluated on different images: run hdovd eval of both on the same"
        )
