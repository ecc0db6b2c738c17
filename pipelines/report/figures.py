"""The tables and charts of a report, as plain values for its template: AP by setting, run and class, errors by kind,
precision and recall, reliability of scores, losses by level, matrices, and what made a run.

The colour of a run is its place among the runs.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from hdovd.evaluation.curves import RECALLS
from hdovd.evaluation.groups import GROUPS, group_of
from hdovd.evaluation.tide import ERRORS
from hdovd.pipelines.ablation.grid import METRICS, SEED, Row, column_texts, scores_of
from hdovd.pipelines.cache_tools.view import Reliability
from hdovd.pipelines.common.charts import Axis, Line, line_chart, matrix_chart
from hdovd.pipelines.common.console import duration
from hdovd.pipelines.common.settings import SWITCH, Settings, different_keys, short_names
from hdovd.pipelines.report.runs import OneRun, Relations, novel_first
from hdovd.pipelines.runs.listing import Run
from hdovd.pipelines.training.hooks import PLAIN

ERROR_NAMES = [*(str(kind) for kind in ERRORS), "all false detections", "all objects not found"]
MISNAMED = {
    "novel named base": ("novel", "base"),
    "novel named another novel": ("novel", "novel"),
    "base named novel": ("base", "novel"),
    "base named another base": ("base", "base"),
}
EQUAL = 1e-9
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


def ablation(runs: Sequence[Run], weights: Sequence[str]) -> dict[str, Any] | None:
    """A row for each setting, features and weights that the runs do not share, the seed aside; None of a single run.

    weights: which each run was evaluated with.
    """
    if len(runs) < 2:
        return None
    settings = [_that_count(run) | {"weights": of_run} for run, of_run in zip(runs, weights, strict=True)]
    keys = [
        key for key in different_keys(settings) if key != SEED and len({repr(s[key]) for s in settings if key in s}) > 1
    ]
    keys.sort(key=lambda key: not key.endswith(SWITCH))
    groups: dict[str, tuple[Settings, list[Run]]] = {}
    for run, values in zip(runs, settings, strict=True):
        groups.setdefault(repr([values.get(key) for key in keys]), (values, []))[1].append(run)
    rows = [
        Row("", tuple(values.get(key) for key in keys), scores_of(dict(enumerate(members))), len(members))
        for values, members in groups.values()
    ]
    means = {metric: [row.mean(metric) for row in rows] for metric in METRICS}
    columns = [column_texts([row.values[k] for row in rows]) for k in range(len(keys))]
    return {
        "columns": list(short_names(keys, {key for run in runs for key in run.settings}).values()),
        "switches": sum(key.endswith(SWITCH) for key in keys),
        "metrics": METRICS,
        "rows": [
            {
                "texts": [column[i] for column in columns],
                "row": row,
                "best": {metric: is_best(means[metric], i) for metric in METRICS},
            }
            for i, row in enumerate(rows)
        ],
    }


def _that_count(run: Run) -> Settings:
    """Its settings, without those of pseudo boxes if it uses none, and which features it read, if it used any."""
    return {
        k: value for k, value in run.settings.items() if uses_pseudo_boxes(run) or not k.startswith("pseudo_boxes.")
    } | ({"features": run.cache_id} if run.distillation else {})


def uses_pseudo_boxes(run: Run) -> bool:
    return any(run.settings.get(f"loss.{level}{SWITCH}") for level in ("instance", "class"))


def is_best(values: Sequence[float | None], place: int) -> bool:
    """Whether no other is higher; a single one is not called the best."""
    value, numbers = values[place], [v for v in values if v is not None]
    return len(values) > 1 and value is not None and value >= max(numbers) - EQUAL


def class_rows(runs: Sequence[OneRun], in_gallery: Collection[str]) -> list[dict[str, Any]]:
    """Novel classes first."""
    protocol, objects = runs[0].analysis.protocol, runs[0].analysis.objects
    counts = np.bincount(objects.labels[~objects.crowd], minlength=len(protocol.names)).tolist()
    rows = []
    for label in novel_first(protocol):
        name = protocol.names[label]
        values = [run.analysis.metrics["per_class"][name] for run in runs]
        ap50 = [value["ap50"] for value in values]
        rows.append(
            {
                "name": name,
                "group": group_of(label, protocol),
                "objects": counts[label],
                "ap50": ap50,
                "ap": [value["ap"] for value in values],
                "in_gallery": name in in_gallery,
                "best": {k for k in range(len(runs)) if is_best(ap50, k)},
            }
        )
    return rows


def most_gained(runs: Sequence[OneRun]) -> float:
    """The longest bar of the table of errors."""
    groups = [run.analysis.errors.groups[group] for run in runs for group in ("novel", "base")]
    return max((gain or 0.0 for errors in groups for _, gain in errors.cells()), default=0.0) or 1.0


def facts(run: OneRun) -> list[tuple[str, str]]:
    """What made a run, and how long it took, as far as its files say."""
    record, known, git = run.folder.record(), run.run, run.run.git or {}
    processes, weight = record.get("processes", "?"), weight_of(run)
    engine = " ".join(map(str, run.analysis.metrics.get("engine", {}).values()))
    found = {
        "folder": run.folder.path.resolve(),
        "begun": f"{known.date:%Y-%m-%d %H:%M}",
        "epochs": f"{known.epochs_done} of {known.epochs}",
        "weights": f"{run.analysis.weights}, evaluated by {engine}",
        **_speed(run),
        "device": f"{record.get('device', '?')}, {processes} process{'' if processes == 1 else 'es'}",
        "cache": f"{known.cache or '-'}, features {known.cache_id or '-'}",
        **{f"{level} level": entry.get("key", "-") for level, entry in known.levels.items()},
        "weight of pseudo labels": weight and formula(weight),
        "commit": git and f"{git.get('commit', '?')}{', with changes' if git.get('dirty') else ''}",
        "versions": ", ".join(f"{name} {version}" for name, version in known.versions.items()),
        "resumed": record.get("resumed") and f"{len(record['resumed'])} times",
    }
    return [(name, str(value)) for name, value in found.items() if value or name == "versions"]


def _speed(run: OneRun) -> dict[str, str]:
    """By the log: of its intervals of steps, as far as they say how fast they went."""
    steps = [entry for entry in run.entries if "images_per_s" in entry]
    rates = [entry["images_per_s"] for entry in steps if entry["images_per_s"]]
    waits, memory = ([entry[key] for entry in steps if key in entry] for key in ("data_wait", "memory_gb"))
    if not steps:
        return {}
    batch, since = run.run.settings.get("train.batch_size", 0), [0, *(entry["step"] for entry in steps)]
    seconds = sum(
        (entry["step"] - done) * batch / entry["images_per_s"]
        for done, entry in zip(since, steps, strict=False)
        if entry["images_per_s"]
    )
    waited = f", {np.mean(waits):.1%} of it waiting for data" if waits else ""
    return {
        "training time": f"{duration(seconds)} by the log, without validation and start",
        "speed": f"{np.median(rates):.1f} images/s{waited}",
        "memory": f"{max(memory):.1f} GB at most" if memory else "",
    }


def weight_of(run: OneRun) -> Reliability | None:
    """That of its pseudo labels, as it recorded it."""
    recorded = run.folder.record().get("reliability")
    if not recorded:
        return None
    centre, width, scale = (float(recorded[name]) for name in ("centre", "width", "scale"))
    return Reliability(centre, width, scale, str(recorded["source"]))


def formula(weight: Reliability) -> str:
    return f"{weight.scale:.3g} * sigmoid((cosine - {weight.centre:.4g}) / {weight.width:.3g}), from {weight.source}"


def _curves(what: str, runs: Sequence[OneRun], curves: Sequence[np.ndarray | None]) -> Markup:
    lines = [
        Line(run.name, RECALLS.tolist(), [None] * len(RECALLS) if curve is None else curve.tolist(), place)
        for place, (run, curve) in enumerate(zip(runs, curves, strict=True))
    ]
    return line_chart(f"precision by recall, {what}", lines, RECALL, PRECISION)


def group_curves(runs: Sequence[OneRun]) -> list[tuple[str, Markup]]:
    """Mean precision of novel, base and all classes."""
    return [
        (f"{group} classes", _curves(f"{group} classes", runs, [run.analysis.curves.group(group) for run in runs]))
        for group in GROUPS
    ]


def class_curves(runs: Sequence[OneRun]) -> list[tuple[str, str, Markup]]:
    """Of every class with objects, novel ones first: name, group, chart."""
    protocol, of_runs = runs[0].analysis.protocol, [run.analysis.curves.precision for run in runs]
    return [
        (
            protocol.names[label],
            group_of(label, protocol),
            _curves(protocol.names[label], runs, [curves[label] for curves in of_runs]),
        )
        for label in novel_first(protocol)
        if not np.isnan(of_runs[0][label, 0])
    ]


def reliability(runs: Sequence[OneRun]) -> Iterator[tuple[str, Markup, str]]:
    """Share of right detections by score, novel and base apart."""
    for group in ("novel", "base"):
        lines = [Line("right as often as it says", [0.0, 1.0], [0.0, 1.0], None, dashed=True)]
        errors = []
        for place, run in enumerate(runs):
            found = run.analysis.reliability[group]
            full = found.counts > 0
            scores, right = found.mean_scores[full].tolist(), found.precisions[full].tolist()
            lines.append(Line(run.name, scores, right, place, dots=True))
            error = "no detections" if found.calibration_error is None else f"{found.calibration_error:.3f}"
            errors.append(f"{run.name} {error}" if len(runs) > 1 else error)
        chart = line_chart(
            f"share of right detections by score, {group} classes",
            lines,
            Axis("score", 0.0, 1.0),
            Axis("right", 0.0, 1.0),
        )
        yield f"{group} classes", chart, "ECE " + "; ".join(errors)


def losses(runs: Sequence[OneRun]) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """By level the charts of its losses; losses that a recipe adds come under their own name."""
    names = dict.fromkeys(name for run in runs for entry in run.entries for name in entry if name not in PLAIN)
    levels: dict[str, list[tuple[str, Markup]]] = {level: [] for level in LEVELS.values()}
    validation = levels.pop(LEVELS["val"])
    for name in names:
        of_runs = [[entry for entry in run.entries if name in entry] for run in runs]
        is_ap = name.startswith("val_")
        lines = [
            Line(run.name, [float(e["step"]) for e in entries], [e[name] for e in entries], place, dots=is_ap)
            for place, (run, entries) in enumerate(zip(runs, of_runs, strict=True))
            if entries
        ]
        y = Axis("percent", 0.0, 100.0) if is_ap else Axis("loss", 0.0)
        level = LEVELS.get(name.partition("_")[0], f"Added by the recipe: {name}")
        charts = validation if is_ap else levels.setdefault(level, [])
        charts.append((name, line_chart(f"{name} by step", lines, Axis("step"), y)))
    return [(level, charts) for level, charts in (levels | {LEVELS["val"]: validation}).items() if charts]


def confusion_chart(run: OneRun) -> Markup:
    """In shares of each row."""
    counts, protocol = run.analysis.confusion.counts.astype(np.float64), run.analysis.protocol
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = [*novel_first(protocol), len(protocol.names)]
    rows, columns = ([(*protocol.names, last)[k] for k in order] for last in ("background", "missed"))
    return matrix_chart(
        f"confusion of {run.name}",
        share[np.ix_(order, order)],
        rows,
        columns,
        low=0.0,
        high=1.0,
        row_title="object: ",
        column_title="detected: ",
    )


def relation_figures(name: str, found: Relations, *, with_teacher: bool) -> Iterator[dict[str, Any]]:
    """The student's matrix, and before it the teacher's if it is not there yet."""
    names = [text + (" (p)" if pseudo else "") for text, pseudo in zip(found.names, found.pseudo.tolist(), strict=True)]
    batch = f"{len(names)} boxes of {len(found.image_ids)} training images"
    alike = "" if found.correlation is None else f"correlation with the teacher's {found.correlation:.2f}; "
    loss = f"{alike}relation loss of this batch {found.loss:.3g}, without its weight"
    sides = [("CLIP, the teacher", found.teacher, batch), (f"{name}, the student", found.student, loss)]
    for side, values, note in sides[not with_teacher :]:
        others = values[~np.eye(len(values), dtype=bool)]
        low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
        yield {
            "name": side,
            "note": f"{note}; cosines {low:.2f} to {high:.2f}",
            "chart": matrix_chart(f"cosines between boxes: {side}", values, names, names, low=low, high=high),
        }
