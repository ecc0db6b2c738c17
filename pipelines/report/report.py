"""One page about one run or several: what they find, what they miss, where the AP comes from. One HTML file that needs
nothing else.

The parts are made by `figures`, and here the two matrices of METHOD section 4, of what the teacher and a trained
detector say of how alike the boxes of one batch are; the page is `pages/report.html`, with its own style, script and
data in it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hdovd.cache import Level, Source
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, log, quiet
from hdovd.core.text_files import read_json
from hdovd.data import METRICS, DataPaths, Protocol, Split, shown_groups
from hdovd.evaluation.tide import ERRORS
from hdovd.modeling.losses.instance import relation_loss
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.common.pages import matrix_chart, write_page
from hdovd.pipelines.dataloading.loader import Draw
from hdovd.pipelines.evaluation.analysis import analyse
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.evaluate import evaluate, load_detector
from hdovd.pipelines.extraction.source import cache_of, data_of_cache
from hdovd.pipelines.report import figures
from hdovd.pipelines.report.config import REPORT_FILE, ReportConfig
from hdovd.pipelines.report.figures import OneRun
from hdovd.pipelines.runs import UPPER_BOUND, RunFolder, read_run
from hdovd.pipelines.training.training_set import TrainingSet


def report(job: ReportConfig) -> Path:
    """Write the page into the folder `job.out`; runs that are not evaluated yet are evaluated first. Returns its path.

    Raises HdovdError for a folder that is no run, runs of different protocols or validation images, and pictures that
    are not there.
    """
    job.check()
    folders = [RunFolder.open(path, trusted=job.trust) for path in job.runs]
    data = data_of(folders, job.data, needed=job.validation is None)
    validation = job.validation or data
    for run in job.runs:
        if not all((run / name).is_file() for name in ("metrics.json", "detections.json")):
            log(f"{run} is not evaluated yet: hdovd eval {run}")
            evaluate(
                EvalConfig(
                    run=run,
                    data=validation,
                    device=job.device,
                    batch_size=job.batch_size,
                    workers=job.workers,
                    trust=job.trust,
                )
            )
    file = job.out / REPORT_FILE
    write_page(file, "report.html", _context(open_runs(folders, validation, job.threshold), job, data))
    return file


def _context(runs: Sequence[OneRun], job: ReportConfig, data: DataPaths) -> dict[str, Any]:
    first, paths = runs[0].analysis, [run.folder.path for run in runs]

    @cache
    def training() -> Split:
        """Read when they are first asked for: COCO's training images take a while. Raises HdovdError."""
        with quiet():
            return data.load("train2017", first.protocol, base_only=True, exif=first.split.exif)

    def relations_of(run: OneRun) -> Iterator[dict[str, Any]]:
        found = relations(
            run.folder, training(), job.relation_images, device=job.device, weights=run.analysis.weights.file
        )
        log(f"{run.name}: relations of {len(found.names)} boxes")
        return _relation_figures(run.name, found)

    parts = figures.parts(runs)
    gains = [gain or 0.0 for run in runs for group in parts for _, gain in run.analysis.errors.groups[group].cells()]
    cards = figures.validation_cards(runs, job.gallery, job.threshold)
    pseudo, pseudo_none = figures.pseudo_boxes(runs if job.pseudo else (), training, job.pseudo)
    matrices, matrices_none = figures.of_each(runs if job.relation_images else (), relations_of)
    return {
        "title": runs[0].name
        if len(runs) == 1
        else f"{len(runs)} runs of {os.path.commonpath([path.resolve() for path in paths])}",
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "protocol": first.protocol,
        "images": len(first.split.images),
        "notes": [note for run in runs for note in run.notes],
        "runs": runs,
        "is_best": figures.is_best,
        "facts": figures.facts,
        "confusion_chart": figures.confusion_chart,
        "ablation": figures.ablation([run.run for run in runs], [run.analysis.weights.value for run in runs]),
        "classes": figures.class_rows(runs, {name for card in cards for name in card["classes"]}),
        "groups": shown_groups(first.protocol),
        "parts": parts,
        "charted": len(figures.charted(runs[0])),
        "metric": METRICS[first.protocol.metric],
        "curves": figures.group_curves(runs),
        "class_curves": figures.class_curves(runs),
        "error_kinds": ERRORS,
        "most_gained": max(gains, default=0.0) or 1.0,
        "threshold": job.threshold,
        "reliability": figures.reliability(runs),
        "losses": figures.losses(runs),
        "gallery": cards,
        "gallery_none": "the gallery was left out" if not job.gallery else "there is none",
        "gallery_events": list(dict.fromkeys(event for card in cards for event in card["events"])),
        "lowest_score": min(
            (
                box["score"]
                for card in cards
                for panel in card["panels"]
                for box in panel["boxes"]
                if box["score"] is not None
            ),
            default=0.0,
        ),
        "pseudo": pseudo,
        "pseudo_none": pseudo_none if job.pseudo else ["Pseudo boxes were left out."],
        "pseudo_most": sorted({str(run.run.settings.get("pseudo_boxes.max_per_image")) for run in runs} - {"None"}),
        "formula": figures.formula,
        "relations": matrices[:1] + matrices[1::2],  # the teacher once
        "relations_none": matrices_none if job.relation_images else ["The matrices were left out."],
        "footer": " ".join(["hdovd report", *map(str, paths)]),
    }


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
        if folder.saw_novel:
            notes.append(f"{name} is an oracle, trained on boxes of novel classes too: its AP is {UPPER_BOUND}")
        if run.epochs is not None and run.epochs_done < run.epochs:
            notes.append(f"{name} has done {run.epochs_done} of its {run.epochs} epochs")
        runs.append(OneRun(name, folder, run, analysis, entries, tuple(notes), _lost(folder, analysis.split)))
        _require_same(runs[0], runs[-1])
    return runs


def _lost(folder: RunFolder, split: Split) -> frozenset[int]:
    """By the table that `hdovd adapt` or `hdovd eval --before` made of these annotations, if one did."""
    file = folder.path / "retention.json"
    tables = read_json(file, "table of AP before and after") if file.is_file() else []
    return frozenset(
        annotation
        for one in tables
        if Path(one["data"]).resolve() == split.annotations.resolve()
        for _, annotation, _ in one["missed"]
    )


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


@dataclass(frozen=True, slots=True)
class Relations:
    """Cosines (n, n) between the teacher's rows e and between the student's rows q, of the same boxes.

    names: what each box is, a base class or the noun of a pseudo box. pseudo: (n,) bool. correlation: Pearson's, of the
    entries above the diagonal; None where there are too few or one side is constant. loss: the relation loss of this
    batch, without its weight.
    """

    image_ids: list[int]
    names: list[str]
    pseudo: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    correlation: float | None
    loss: float


def relations(
    run: RunFolder, split: Split, images: int, *, device: str = "auto", weights: str = "model.safetensors"
) -> Relations:
    """The matrices for `images` of the training images `split`: those with the most boxes, and those with a proposal
    before all others.

    Raises HdovdError, saying why, if the run has no instance level, or its cache cannot be read any more or is of other
    images.
    """
    recipe, protocol = run.recipe(), run.protocol()
    if not recipe.loss.instance.enabled:
        raise HdovdError("this run has no instance level, so no student embeddings")
    cache = cache_of(run)
    with quiet():
        unflipped = {"input": recipe.input.model_copy(update={"flip": 0.0})}
        training = TrainingSet(split, cache, recipe.model_copy(update=unflipped))
    batch = [training[Draw(0, 0, i)] for i in _telling(training, images)]
    place = pick_device(device)
    model = load_detector(run, training.dim, place, weights).eval()
    ids = [image_id for _, _, image_id in batch]
    found = model.students([pixels.to(place) for pixels, _, _ in batch], [t.to(place) for _, t, _ in batch], ids)
    if not len(found.box):
        raise HdovdError(
            f"no box of these {len(ids)} training images has a student embedding: the run finds none of them yet"
        )
    teacher = torch.cat([rows for t in found.targets for rows in (t.embeddings, t.pseudo_embeddings)])[found.box]
    names, pseudo = _names(found.targets, cache, protocol)
    order = sorted(range(len(found.box)), key=lambda k: (bool(pseudo[found.box[k]]), names[found.box[k]]))
    q, e, box = found.q[order], teacher[order], found.box[order].tolist()
    of_teacher, of_student = ((rows @ rows.T).cpu().numpy() for rows in (e, q))
    return Relations(
        ids,
        [names[b] for b in box],
        np.array([pseudo[b] for b in box], bool),
        of_teacher,
        of_student,
        _correlation(of_teacher, of_student),
        float(relation_loss(q, e, recipe.loss.instance.relation_tau, recipe.loss.instance.relation_temperature)),
    )


def _telling(training: TrainingSet, count: int) -> list[int]:
    """Places of the images that are shown: the most boxes first, those with a proposal before all others; then by
    place.
    """
    base, proposals = (training.cache.counts(source) for source in (Source.BASE_BOX, Source.PROPOSAL))

    def order(index: int) -> tuple[bool, int]:
        image = training.images[index].id
        return not proposals[image], -base[image] - proposals[image]

    return sorted(range(len(training)), key=order)[:count]


def _names(targets: list[Any], cache: FeatureCache, protocol: Protocol) -> tuple[list[str], list[bool]]:
    """The name of every box of a batch, and whether it is a pseudo box. A label of several nouns is named by the one
    most like it.
    """
    nouns = cache.names(Level.NOUN) if Level.NOUN in cache.levels() else []
    rows = torch.from_numpy(cache.embeddings(Level.NOUN)) if nouns else torch.zeros(0, cache.dim)
    names, pseudo = list[str](), list[bool]()
    for target in targets:
        names += [protocol.names[label] for label in target.labels.tolist()]
        if nouns and len(target.pseudo_texts):
            names += [nouns[k] for k in (target.pseudo_texts.cpu() @ rows.T).argmax(dim=1).tolist()]
        elif not nouns:
            names += ["pseudo box"] * len(target.pseudo_boxes)
        pseudo += [False] * len(target.boxes) + [True] * len(target.pseudo_boxes)
    return names, pseudo


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    x, y = (values[np.triu_indices(len(values), k=1)] for values in (a, b))
    return None if len(x) < 2 or x.std() == 0 or y.std() == 0 else float(np.corrcoef(x, y)[0, 1])


def _relation_figures(name: str, found: Relations) -> Iterator[dict[str, Any]]:
    """The teacher's matrix, and the student's."""
    names = [text + (" (p)" if pseudo else "") for text, pseudo in zip(found.names, found.pseudo.tolist(), strict=True)]
    batch = f"{len(names)} boxes of {len(found.image_ids)} training images"
    alike = "" if found.correlation is None else f"correlation with the teacher's {found.correlation:.2f}; "
    for side, values, note in (
        ("CLIP, the teacher", found.teacher, batch),
        (
            f"{name}, the student",
            found.student,
            f"{alike}relation loss of this batch {found.loss:.3g}, without its weight",
        ),
    ):
        others = values[~np.eye(len(values), dtype=bool)]
        low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
        yield {
            "name": side,
            "note": f"{note}; cosines {low:.2f} to {high:.2f}",
            "chart": matrix_chart(f"cosines between boxes: {side}", values, names, names, low=low, high=high),
        }
