"""One page about one run or several: what they find, what they miss, where the AP comes from. One HTML file that needs
nothing else.

The parts are made by `figures`; the page is `pages/report.html`, with its own style, script and data in it.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from hdovd.core.log import log, quiet
from hdovd.data.coco import DataPaths, Split
from hdovd.data.protocol import METRICS, shown_groups
from hdovd.pipelines.common.pages import write_page
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.evaluate import evaluate
from hdovd.pipelines.report import figures
from hdovd.pipelines.report.config import REPORT_FILE, ReportConfig
from hdovd.pipelines.report.runs import OneRun, data_of, open_runs, relations
from hdovd.pipelines.runs.folder import RunFolder

SECTIONS = (
    ("ap", "AP"),
    ("curves", "Curves"),
    ("errors", "Errors"),
    ("confusion", "Confusion"),
    ("reliability", "Scores"),
    ("losses", "Losses"),
    ("gallery", "Images"),
    ("pseudo", "Pseudo boxes"),
    ("relations", "Relations"),
    ("identity", "Identity"),
)


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
        _evaluate_if_needed(run, job, validation)
    file = job.out / REPORT_FILE
    write_page(file, "report.html", _context(open_runs(folders, validation, job.threshold), job, data))
    return file


def _evaluate_if_needed(run: Path, job: ReportConfig, data: DataPaths) -> None:
    if all((run / name).is_file() for name in ("metrics.json", "detections.json")):
        return
    log(f"{run} is not evaluated yet: hdovd eval {run}")
    evaluate(
        EvalConfig(
            run=run, data=data, device=job.device, batch_size=job.batch_size, workers=job.workers, trust=job.trust
        )
    )


def _context(runs: Sequence[OneRun], job: ReportConfig, data: DataPaths) -> dict[str, Any]:
    first, paths = runs[0].analysis, [run.folder.path for run in runs]

    @cache
    def training() -> Split:
        """Read when they are first asked for: COCO's training images take a while. Raises HdovdError."""
        with quiet():
            return data.load("train2017", first.protocol, base_only=True, exif=first.split.exif)

    def relation_figures(run: OneRun) -> Iterator[dict[str, Any]]:
        found = relations(
            run.folder, training(), job.relation_images, device=job.device, weights=run.analysis.weights.file
        )
        log(f"{run.name}: relations of {len(found.names)} boxes")
        return figures.relation_figures(run.name, found)

    cards = figures.validation_cards(runs, job.gallery, job.threshold)
    shown = [box["score"] for card in cards for panel in card["panels"] for box in panel["boxes"]]
    pseudo, pseudo_none = figures.pseudo_boxes(runs if job.pseudo else (), training, job.pseudo)
    matrices, matrices_none = figures.of_each(runs if job.relation_images else (), relation_figures)
    return {
        "title": runs[0].name
        if len(runs) == 1
        else f"{len(runs)} runs of {os.path.commonpath([path.resolve() for path in paths])}",
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "sections": SECTIONS,
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
        "parts": figures.parts(runs),
        "charted": len(figures.charted(runs[0])),
        "metric": METRICS[first.protocol.metric],
        "curves": figures.group_curves(runs),
        "class_curves": figures.class_curves(runs),
        "error_kinds": figures.ERROR_NAMES,
        "most_gained": figures.most_gained(runs),
        "misnamed": figures.MISNAMED,
        "threshold": job.threshold,
        "reliability": figures.reliability(runs),
        "losses": figures.losses(runs),
        "gallery": cards,
        "gallery_none": "the gallery was left out" if not job.gallery else "there is none",
        "gallery_events": list(dict.fromkeys(event for card in cards for event in card["events"])),
        "lowest_score": min((score for score in shown if score is not None), default=0.0),
        "pseudo": pseudo,
        "pseudo_none": pseudo_none if job.pseudo else ["Pseudo boxes were left out."],
        "pseudo_most": sorted({str(run.run.settings.get("pseudo_boxes.max_per_image")) for run in runs} - {"None"}),
        "formula": figures.formula,
        "relations": matrices[:1] + matrices[1::2],  # the teacher once
        "relations_none": matrices_none if job.relation_images else ["The matrices were left out."],
        "footer": " ".join(["hdovd report", *map(str, paths)]),
    }
