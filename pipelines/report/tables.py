"""The tables of a report, as plain values for its template: AP by setting, run and class, errors by kind, and what made
a run.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from hdovd.evaluation.coco import GROUPS
from hdovd.evaluation.tide import ERRORS
from hdovd.pipelines.ablation.cells import SEED
from hdovd.pipelines.ablation.table import METRICS, NO, YES, Row
from hdovd.pipelines.common.console import duration
from hdovd.pipelines.common.settings import SWITCH, Settings, different_keys, short_names, shown_apart
from hdovd.pipelines.report.runs import OneRun, novel_first
from hdovd.pipelines.runs.listing import Run

ERROR_NAMES = [*(str(kind) for kind in ERRORS), "all false detections", "all objects not found"]
MISNAMED = {
    "novel named base": ("novel", "base"),
    "novel named another novel": ("novel", "novel"),
    "base named novel": ("base", "novel"),
    "base named another base": ("base", "base"),
}
EQUAL = 1e-9


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
    groups: dict[str, list[Run]] = {}
    of_group: dict[str, Settings] = {}
    for run, values in zip(runs, settings, strict=True):
        group = repr([values.get(key) for key in keys])
        groups.setdefault(group, []).append(run)
        of_group[group] = values
    rows = []
    for group, members in groups.items():
        scores: dict[str, dict[int, float | None]] = {
            metric: {
                k: run.ap50.get(metric) if metric in GROUPS else run.split_blind.get("novel")
                for k, run in enumerate(members)
            }
            for metric in METRICS
        }
        rows.append(Row("", tuple(of_group[group].get(key) for key in keys), scores, len(members)))
    columns = [_texts([row.values[k] for row in rows]) for k in range(len(keys))]
    names = short_names(keys, {key for run in runs for key in run.settings})
    return {
        "columns": [names[key] for key in keys],
        "switches": sum(key.endswith(SWITCH) for key in keys),
        "metrics": METRICS,
        "rows": [
            {
                "texts": [column[i] for column in columns],
                "row": row,
                "best": {
                    metric: len(rows) > 1 and _is_best([other.mean(metric) for other in rows], row.mean(metric))
                    for metric in METRICS
                },
            }
            for i, row in enumerate(rows)
        ],
    }


def _that_count(run: Run) -> Settings:
    """Its settings, without those of pseudo boxes if it uses none, and which features it read, if it used any."""
    uses_them = any(run.settings.get(f"loss.{level}{SWITCH}") for level in ("instance", "class"))
    kept = {key: value for key, value in run.settings.items() if uses_them or not key.startswith("pseudo_boxes.")}
    return kept | ({"features": run.cache_id} if run.distillation else {})


def _texts(values: Sequence[Any]) -> list[str]:
    """Of one column: ticks for switches."""
    if all(isinstance(value, bool) for value in values):
        return [YES if value else NO for value in values]
    return shown_apart(values)


def run_row(run: OneRun, runs: Sequence[OneRun]) -> dict[str, Any]:
    """A run in the table of AP, and the facts about it."""
    metrics = run.analysis.metrics
    best = {
        group: len(runs) > 1 and _is_best([r.analysis.metrics["ap50"][group] for r in runs], metrics["ap50"][group])
        for group in GROUPS
    }
    return {
        "name": run.name,
        "levels": ", ".join(run.run.distillation) or "none",
        "metrics": metrics,
        "best": best,
        "facts": facts(run),
        "seed": "-" if run.run.seed is None else run.run.seed,
    }


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
                "group": "novel" if label >= len(protocol.base) else "base",
                "objects": counts[label],
                "ap50": ap50,
                "ap": [value["ap"] for value in values],
                "in_gallery": name in in_gallery,
                "best": {k for k, value in enumerate(ap50) if len(runs) > 1 and _is_best(ap50, value)},
            }
        )
    return rows


def _is_best(values: Sequence[float | None], value: float | None) -> bool:
    numbers = [v for v in values if v is not None]
    return value is not None and value >= max(numbers) - EQUAL


def error_rows(runs: Sequence[OneRun]) -> list[dict[str, Any]]:
    """Counts and AP50 that would be gained, by kind, of novel and of base classes; the longest bar of the table has
    share 1.
    """
    rows = list[dict[str, Any]]()
    for group in ("novel", "base"):
        for run in runs:
            errors = run.analysis.errors.groups[group]
            cells: list[dict[str, Any]] = [{"count": errors.counts[kind], "dap": errors.gains[kind]} for kind in ERRORS]
            cells += [
                {"count": errors.false_positives, "dap": errors.false_positive_gain},
                {"count": errors.false_negatives, "dap": errors.false_negative_gain},
            ]
            rows.append({"run": run.name, "group": group, "cells": cells})
    most = max((float(cell["dap"] or 0.0) for row in rows for cell in row["cells"]), default=0.0) or 1.0
    for row in rows:
        for cell in row["cells"]:
            cell["share"] = max(cell["dap"] or 0.0, 0.0) / most
    return rows


def misnamed_rows(runs: Sequence[OneRun]) -> list[dict[str, Any]]:
    """Of each run the classification errors in the order of `MISNAMED`."""
    return [
        {"run": run.name, "counts": [run.analysis.errors.misnamed[truth][named] for truth, named in MISNAMED.values()]}
        for run in runs
    ]


def facts(run: OneRun) -> list[tuple[str, str]]:
    """What made a run, and how long it took, as far as its files say."""
    record, settings = run.folder.record(), run.run.settings
    steps = [entry for entry in run.entries if "images_per_s" in entry]
    found = [
        ("folder", str(run.folder.path.resolve())),
        ("begun", f"{run.run.date:%Y-%m-%d %H:%M}"),
        ("epochs", f"{run.run.epochs_done} of {run.run.epochs}"),
        (
            "weights",
            f"{run.analysis.weights}, evaluated by "
            + " ".join(str(v) for v in run.analysis.metrics.get("engine", {}).values()),
        ),
    ]
    if steps:
        rates = [entry["images_per_s"] for entry in steps if entry["images_per_s"]]
        waits, memory = ([e[key] for e in steps if key in e] for key in ("data_wait", "memory_gb"))
        batch, since = settings.get("train.batch_size", 0), [0, *(entry["step"] for entry in steps)]
        seconds = sum(
            (entry["step"] - done) * batch / entry["images_per_s"]
            for done, entry in zip(since, steps, strict=False)
            if entry["images_per_s"]
        )
        found += [
            ("training time", f"{duration(seconds)} by the log, without validation and start"),
            (
                "speed",
                f"{np.median(rates):.1f} images/s"
                + (f", {np.mean(waits):.1%} of it waiting for data" if waits else ""),
            ),
        ]
        found += [("memory", f"{max(memory):.1f} GB at most")] if memory else []
    found.append(
        (
            "device",
            f"{record.get('device', '?')}, {record.get('processes', '?')} process"
            + ("" if record.get("processes") == 1 else "es"),
        )
    )
    found += [("cache", f"{run.run.cache or '-'}, features {run.run.cache_id or '-'}")]
    found += [(f"{level} level", str(entry.get("key", "-"))) for level, entry in run.run.levels.items()]
    if reliability := record.get("reliability"):
        found.append(
            (
                "weight of pseudo labels",
                f"{reliability['scale']:.3g} * sigmoid((cosine - {reliability['centre']:.4g}) / "
                f"{reliability['width']:.3g}), from {reliability['source']}",
            )
        )
    if git := run.run.git:
        found.append(("commit", str(git.get("commit", "?")) + (", with changes" if git.get("dirty") else "")))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in run.run.versions.items())))
    if resumed := record.get("resumed"):
        found.append(("resumed", f"{len(resumed)} times"))
    return found
