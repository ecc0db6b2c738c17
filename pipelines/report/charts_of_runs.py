"""The charts of a report: precision and recall, reliability of scores, losses by level, and the matrices.

The colour of a run is its place among the runs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from hdovd.evaluation.coco import GROUPS
from hdovd.evaluation.pr_curves import RECALLS
from hdovd.pipelines.common.charts import Axis, Line, line_chart, matrix_chart
from hdovd.pipelines.report.relations import Relations
from hdovd.pipelines.report.runs import OneRun, novel_first
from hdovd.pipelines.training.hooks import PLAIN

MOST_CONFUSIONS = 12
LEVELS = {
    "rpn": "Detector",
    "box": "Detector",
    "giou": "Detector",
    "objectness": "Detector",
    "classification": "Class level: base classes and the nouns of pseudo boxes",
    "text": "Class level, in text space",
    "instance": "Instance level",
    "image": "Image level",
    "val": "Validation AP50",
}
RECALL, PRECISION = Axis("recall", 0.0, 1.0), Axis("precision", 0.0, 1.0)


def group_curves(runs: Sequence[OneRun]) -> list[tuple[str, Markup]]:
    """Mean precision of novel, base and all classes."""
    charts = []
    for group in GROUPS:
        curves = [run.analysis.curves.group(group) for run in runs]
        lines = [
            Line(run.name, RECALLS.tolist(), [None] * len(RECALLS) if curve is None else curve.tolist(), place)
            for place, (run, curve) in enumerate(zip(runs, curves, strict=True))
        ]
        charts.append(
            (f"{group} classes", line_chart(f"precision by recall, {group} classes", lines, RECALL, PRECISION))
        )
    return charts


def class_curves(runs: Sequence[OneRun]) -> list[tuple[str, str, Markup]]:
    """Of every class with objects, novel ones first: name, group, chart."""
    protocol, charts = runs[0].analysis.protocol, []
    for label in novel_first(protocol):
        lines = [
            Line(run.name, RECALLS.tolist(), run.analysis.curves.precision[label].tolist(), place)
            for place, run in enumerate(runs)
        ]
        if not np.isnan(runs[0].analysis.curves.precision[label, 0]):
            name = protocol.names[label]
            charts.append(
                (
                    name,
                    "novel" if label >= len(protocol.base) else "base",
                    line_chart(f"precision by recall, {name}", lines, RECALL, PRECISION),
                )
            )
    return charts


def reliability(runs: Sequence[OneRun]) -> list[tuple[str, Markup, str]]:
    """Share of right detections by score, novel and base apart."""
    charts = []
    for group in ("novel", "base"):
        lines = [Line("right as often as it says", [0.0, 1.0], [0.0, 1.0], None, dashed=True)]
        errors = []
        for place, run in enumerate(runs):
            found = run.analysis.reliability[group]
            full = found.counts > 0
            lines.append(
                Line(run.name, found.mean_scores[full].tolist(), found.precisions[full].tolist(), place, dots=True)
            )
            error = "no detections" if found.calibration_error is None else f"{found.calibration_error:.3f}"
            errors.append(f"{run.name} {error}" if len(runs) > 1 else error)
        charts.append(
            (
                f"{group} classes",
                line_chart(
                    f"share of right detections by score, {group} classes",
                    lines,
                    Axis("score", 0.0, 1.0),
                    Axis("right", 0.0, 1.0),
                ),
                "ECE " + "; ".join(errors),
            )
        )
    return charts


def losses(runs: Sequence[OneRun]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """By level the charts of its losses; losses that a recipe adds come under their own name."""
    names = dict.fromkeys(name for run in runs for entry in run.entries for name in entry if name not in PLAIN)
    levels: dict[str, list[tuple[str, Markup]]] = {}
    for name in names:
        lines = []
        for place, run in enumerate(runs):
            points = [(entry["step"], entry[name]) for entry in run.entries if name in entry]
            if points:
                lines.append(
                    Line(
                        run.name,
                        [float(a) for a, _ in points],
                        [b for _, b in points],
                        place,
                        dots=name.startswith("val_"),
                    )
                )
        y = Axis("percent", 0.0, 100.0) if name.startswith("val_") else Axis("loss", 0.0)
        level = LEVELS.get(name.partition("_")[0], f"Added by the recipe: {name}")
        levels.setdefault(level, []).append((name, line_chart(f"{name} by step", lines, Axis("step"), y)))
    order = list(dict.fromkeys(LEVELS.values()))
    return sorted(levels.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order) - 1)


def confusion(run: OneRun) -> dict[str, Any]:
    """The matrix in shares of each row, and the most frequent pairs."""
    found = run.analysis.confusion
    counts = found.counts.astype(np.float64)
    share = np.divide(
        counts,
        counts.sum(axis=1, keepdims=True),
        out=np.zeros_like(counts),
        where=counts.sum(axis=1, keepdims=True) > 0,
    )
    names = run.analysis.protocol.names
    order = [*novel_first(run.analysis.protocol), len(names)]
    rows, columns = ([(*names, last)[k] for k in order] for last in ("background", "missed"))
    pairs = [
        {
            "truth": pair.truth,
            "truth_group": pair.truth_group,
            "predicted": pair.named,
            "predicted_group": pair.named_group,
            "count": pair.count,
            "share": pair.share,
        }
        for pair in found.top(MOST_CONFUSIONS)
    ]
    chart = matrix_chart(
        f"confusion of {run.name}",
        share[np.ix_(order, order)],
        rows,
        columns,
        low=0.0,
        high=1.0,
        row_title="object: ",
        column_title="detected: ",
    )
    return {"confusion": chart, "confusions": pairs}


def relation_figures(name: str, found: Relations, *, with_teacher: bool) -> list[dict[str, Any]]:
    """The student's matrix, and before it the teacher's if it is not there yet."""
    names = [text + (" (p)" if pseudo else "") for text, pseudo in zip(found.names, found.pseudo.tolist(), strict=True)]
    batch = f"{len(names)} boxes of {len(found.image_ids)} training images"
    sides = [("CLIP, the teacher", found.teacher, batch)] if with_teacher else []
    alike = "" if found.correlation is None else f"correlation with the teacher's {found.correlation:.2f}; "
    sides.append(
        (
            f"{name}, the student",
            found.student,
            f"{alike}relation loss of this batch {found.loss:.3g}, without its weight",
        )
    )
    figures = []
    for side, values, note in sides:
        others = values[~np.eye(len(values), dtype=bool)]
        low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
        chart = matrix_chart(f"cosines between boxes: {side}", values, names, names, low=low, high=high)
        figures.append({"name": side, "note": f"{note}; cosines {low:.2f} to {high:.2f}", "chart": chart})
    return figures
