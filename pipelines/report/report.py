"""One page about one run or several: what they find, what they miss, where the AP comes from. One HTML file that needs
nothing else.

The parts are made by `tables`, `charts_of_runs` and `gallery`; the page is
`pages/report.html`, with its own style and script in it.

HTML pages that need nothing else: a template of the folder `pages` with styles, scripts and data inside.
"""

import os
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.version import __version__
from hdovd.data.coco import DataPaths
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.evaluate import evaluate
from hdovd.pipelines.report import charts_of_runs as report_charts
from hdovd.pipelines.report import gallery as report_gallery
from hdovd.pipelines.report import tables as report_tables
from hdovd.pipelines.report.config import REPORT_FILE, ReportConfig
from hdovd.pipelines.report.relations import relations
from hdovd.pipelines.report.runs import OneRun, TrainingImages, data_of, open_runs
from hdovd.pipelines.runs.folder import RunFolder, Weights

# Nothing is loaded from anywhere: style, script and pictures are in the page.
CONTENT_POLICY = Markup(
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:\">"
)


def page(template: str, context: dict[str, Any]) -> str:
    """A template with `css` and `js`, what all pages have. What is not Markup is escaped: names may hold anything."""
    folder = resources.files("hdovd").joinpath("pipelines", "pages")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False, loader=jinja2.FunctionLoader(text)
    )
    parts = {end: Markup(text(f"page.{end}")) for end in ("css", "js")}
    return environment.get_template(template).render(policy=CONTENT_POLICY, **parts, **context)


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
    runs = open_runs(folders, validation, job.threshold)
    context = _context(runs, job, data)
    file = job.out / REPORT_FILE
    write_text(file, page("report.html", context))
    log(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB, one file that needs nothing else)")
    return file


def _evaluate_if_needed(run: Path, job: ReportConfig, data: DataPaths) -> None:
    if all((run / name).is_file() for name in ("metrics.json", "detections.json")):
        return
    log(f"{run} is not evaluated yet: hdovd eval {run}")
    evaluate(
        EvalConfig(
            run=run,
            data=data,
            device=job.device,
            batch_size=job.batch_size,
            workers=job.workers,
            weights=Weights.LAST,
            trust=job.trust,
        )
    )


def _context(runs: Sequence[OneRun], job: ReportConfig, data: DataPaths) -> dict[str, Any]:
    first = runs[0].analysis
    gallery = report_gallery.validation_cards(runs, job.gallery, job.threshold)
    training = TrainingImages(data, first.protocol, first.split.exif)
    pseudo, pseudo_none = report_gallery.pseudo_boxes(runs, training, job.pseudo)
    matrices, matrices_none = _relations(runs, job, training)
    return {
        "title": runs[0].name
        if len(runs) == 1
        else f"{len(runs)} runs of {os.path.commonpath([r.folder.path.resolve() for r in runs])}",
        "version": __version__,
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "sections": SECTIONS,
        "protocol": first.protocol,
        "images": len(first.split.images),
        "notes": [note for run in runs for note in run.notes],
        "runs": [report_tables.run_row(run, runs) | report_charts.confusion(run) for run in runs],
        "ablation": report_tables.ablation([run.run for run in runs], [run.analysis.weights.value for run in runs]),
        "classes": report_tables.class_rows(runs, {name for card in gallery for name in card["classes"]}),
        "curves": report_charts.group_curves(runs),
        "class_curves": report_charts.class_curves(runs),
        "error_kinds": report_tables.ERROR_NAMES,
        "errors": report_tables.error_rows(runs),
        "misnamed_ways": list(report_tables.MISNAMED),
        "misnamed": report_tables.misnamed_rows(runs),
        "threshold": job.threshold,
        "reliability": report_charts.reliability(runs),
        "losses": report_charts.losses(runs),
        "gallery": gallery,
        "gallery_none": "the gallery was left out" if not job.gallery else "there is none",
        "gallery_events": list(dict.fromkeys(event for card in gallery for event in card["events"])),
        "lowest_score": min(
            (
                box["score"]
                for card in gallery
                for panel in card["panels"]
                for box in panel["boxes"]
                if box["score"] is not None
            ),
            default=0.0,
        ),
        "pseudo": pseudo,
        "pseudo_none": pseudo_none,
        "relations": matrices,
        "relations_none": matrices_none,
        "footer": "hdovd " + " ".join(["report", *(str(run.folder.path) for run in runs)]),
    }


def _relations(runs: Sequence[OneRun], job: ReportConfig, training: TrainingImages) -> tuple[list[Any], list[str]]:
    """The figures, and of each run without one why."""
    figures: list[Any] = []
    reasons: list[str] = []
    if not job.relation_images:
        return figures, ["The matrices were left out."]
    for run in runs:
        try:
            found = relations(
                run.folder, training.split, job.relation_images, device=job.device, weights=run.analysis.weights.file
            )
        except HdovdError as error:
            reasons.append(f"{run.name}: {error}")
        else:
            figures += report_charts.relation_figures(run.name, found, with_teacher=not figures)
            log(f"{run.name}: relations of {len(found.names)} boxes")
    return figures, reasons
