"""What a report shows of its runs, as plain values for its template: tables of AP by setting, run and class; charts of
precision and recall, reliability of scores and losses by level, matrices; what made a run; and pictures, validation
images with truth and detections, training images with their pseudo boxes.

The colour of a run is its place among the runs. A card is a picture as data, its size in pixels of the original image,
and boxes in the same pixels.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from hdovd.cache import Source
from hdovd.core import HdovdError
from hdovd.data import ImageBoxes, Protocol, Split, group_of, shown_groups
from hdovd.evaluation.matching import RECALLS
from hdovd.evaluation.tide import Kind
from hdovd.pipelines.ablation.grid import BLIND, SEED, Row, column_texts, scores_of
from hdovd.pipelines.cache_tools.view import CacheView, Reliability, gather_view, marked, names_and_cosines
from hdovd.pipelines.common.console import duration
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.pages import Axis, Line, line_chart, matrix_chart, small_picture_data
from hdovd.pipelines.common.settings import SWITCH, Settings, different_keys, short_names
from hdovd.pipelines.evaluation.analysis import ImageVerdicts, RunAnalysis
from hdovd.pipelines.extraction.source import cache_of
from hdovd.pipelines.runs import ORACLE, PLAIN, Run, RunFolder, table_groups

MOST_CHARTED = 100  # classes: more would make the page unwieldy
LEVELS = {
    "rpn": "Detector",
    "selection": "Detector",
    "denoising": "Detector",
    "box": "Detector",
    "giou": "Detector",
    "objectness": "Detector",
    "classification": "Class level: base classes and the nouns of pseudo boxes",
    "text": "Class level, in text space",
    "instance": "Instance level",
    "image": "Image level",
    "val": "Validation AP",
}


@dataclass(frozen=True, slots=True)
class OneRun:
    """A run by the name that the report calls it by. `entries`: its log. `notes`: what a reader should know of it.
    `lost`: annotation ids of objects that it misses, and that the run which it was adapted from found.
    """

    name: str
    folder: RunFolder
    run: Run
    analysis: RunAnalysis
    entries: list[dict[str, Any]]
    notes: tuple[str, ...]
    lost: frozenset[int] = frozenset()


def ablation(runs: Sequence[Run], weights: Sequence[str]) -> dict[str, Any] | None:
    """A row for each setting, features and weights that the runs do not share, the seed aside; None of a single run.

    weights: which each run was evaluated with.
    """
    if len(runs) < 2:
        return None
    settings = [_that_count(run) | {"weights": of_run} for run, of_run in zip(runs, weights, strict=True)]
    varying = (key for key in different_keys(settings) if len({repr(s[key]) for s in settings if key in s}) > 1)
    keys = sorted((key for key in varying if key != SEED), key=lambda key: not key.endswith(SWITCH))
    groups: dict[str, tuple[Settings, list[Run]]] = {}
    for run, values in zip(runs, settings, strict=True):
        groups.setdefault(repr([values.get(key) for key in keys]), (values, []))[1].append(run)
    rows = [
        Row("", tuple(values.get(key) for key in keys), scores_of(dict(enumerate(members))), len(members))
        for values, members in groups.values()
    ]
    metrics = (*table_groups(runs), BLIND)

    columns = [column_texts([row.values[k] for row in rows]) for k in range(len(keys))]
    return {
        "columns": list(short_names(keys, {key for run in runs for key in run.settings}).values()),
        "switches": sum(key.endswith(SWITCH) for key in keys),
        "metrics": metrics,
        "rows": [
            {
                "texts": [column[i] for column in columns],
                "row": row,
                "best": {metric: is_best([other.moments(metric)[0] for other in rows], i) for metric in metrics},
            }
            for i, row in enumerate(rows)
        ],
    }


def _that_count(run: Run) -> Settings:
    """Its settings, without those of pseudo boxes if it uses none, which features it read, if it used any, and whether
    it is an oracle.
    """
    return (
        {k: value for k, value in run.settings.items() if uses_pseudo_boxes(run) or not k.startswith("pseudo_boxes.")}
        | ({"features": run.cache_id} if run.distillation else {})
        | {ORACLE: run.oracle}
    )


def uses_pseudo_boxes(run: Run) -> bool:
    return any(run.settings.get(f"loss.{level}{SWITCH}") for level in ("instance", "class"))


def is_best(values: Sequence[float | None], place: int) -> bool:
    """Whether no other is higher; a single one is not called the best."""
    value, numbers = values[place], [v for v in values if v is not None]
    return len(values) > 1 and value is not None and value >= max(numbers) - 1e-9


def class_rows(runs: Sequence[OneRun], in_gallery: Collection[str]) -> list[dict[str, Any]]:
    """Novel classes first."""
    protocol, per_class = runs[0].analysis.protocol, [run.analysis.metrics["per_class"] for run in runs]
    return [
        {
            "name": name,
            "group": group_of(label, protocol),
            "objects": count,
            "ap50": [values[name]["ap50"] for values in per_class],
            "ap": [values[name]["ap"] for values in per_class],
            "in_gallery": name in in_gallery,
        }
        for label, count in object_counts(runs[0]).items()
        for name in [protocol.names[label]]
    ]


def object_counts(run: OneRun) -> dict[int, int]:
    """Of each class, by its label, novel ones first."""
    protocol, objects = run.analysis.protocol, run.analysis.objects
    counts = np.bincount(objects.labels[~objects.crowd], minlength=len(protocol.names)).tolist()
    novel_first = sorted(range(len(counts)), key=lambda label: group_of(label, protocol) == "base")
    return {label: counts[label] for label in novel_first}


def parts(runs: Sequence[OneRun]) -> list[str]:
    """The groups that the classes fall into: novel and base, or the protocol's own."""
    return [group for group in shown_groups(runs[0].analysis.protocol) if group != "all"]


def charted(run: OneRun) -> list[int]:
    """The labels that charts by class show, novel ones first: all, or of many classes the MOST_CHARTED with the most
    objects, half of them novel where there are as many.
    """
    counts, novel_count = object_counts(run), len(run.analysis.protocol.novel)
    novel, base = (
        sorted(part, key=lambda label: -counts[label]) for part in ([*counts][:novel_count], [*counts][novel_count:])
    )
    few = max(MOST_CHARTED // 2, MOST_CHARTED - len(base))
    shown = {*novel[:few], *base[: MOST_CHARTED - len(novel[:few])]}
    return [label for label in counts if label in shown]


def facts(run: OneRun) -> list[tuple[str, str]]:
    """What made a run, and how long it took, as far as its files say."""
    record, known, git = run.folder.record(), run.run, run.run.git or {}
    processes, weight = record.get("processes", "?"), Reliability.recorded(record)
    found = {
        "folder": run.folder.path.resolve(),
        "begun": f"{known.date:%Y-%m-%d %H:%M}",
        "epochs": f"{known.epochs_done} of {known.epochs}",
        "weights": f"{run.analysis.weights}, evaluated by "
        + " ".join(map(str, run.analysis.metrics.get("engine", {}).values())),
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


def formula(weight: Reliability) -> str:
    return f"{weight.scale:.3g} * sigmoid((cosine - {weight.centre:.4g}) / {weight.width:.3g}), from {weight.source}"


def _curves(what: str, runs: Sequence[OneRun], curves: Sequence[np.ndarray | None]) -> Markup:
    lines = [
        Line(run.name, RECALLS.tolist(), [None] * len(RECALLS) if curve is None else curve.tolist(), place)
        for place, (run, curve) in enumerate(zip(runs, curves, strict=True))
    ]
    return line_chart(f"precision by recall, {what}", lines, Axis("recall", 0.0, 1.0), Axis("precision", 0.0, 1.0))


def group_curves(runs: Sequence[OneRun]) -> list[tuple[str, Markup]]:
    """Mean precision of the classes of each group."""
    return [
        (f"{group} classes", _curves(f"{group} classes", runs, [run.analysis.curves.group(group) for run in runs]))
        for group in shown_groups(runs[0].analysis.protocol)
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
        for label in charted(runs[0])
        if not np.isnan(of_runs[0][label, 0])
    ]


def reliability(runs: Sequence[OneRun]) -> Iterator[tuple[str, Markup, str]]:
    """Share of right detections by score, of each group apart."""
    for group in parts(runs):
        lines, errors = [Line("right as often as it says", [0.0, 1.0], [0.0, 1.0], None, dashed=True)], []
        for place, run in enumerate(runs):
            found = run.analysis.reliability[group]
            scores, right = (values[found.counts > 0].tolist() for values in (found.mean_scores, found.precisions))
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
    levels: dict[str, list[tuple[str, Markup]]] = {level: [] for level in LEVELS.values()}
    for name in dict.fromkeys(key for run in runs for entry in run.entries for key in entry if key not in PLAIN):
        of_runs = [[entry for entry in run.entries if name in entry] for run in runs]
        is_ap = name.startswith("val_")
        lines = [
            Line(run.name, [float(e["step"]) for e in entries], [e[name] for e in entries], place, dots=is_ap)
            for place, (run, entries) in enumerate(zip(runs, of_runs, strict=True))
            if entries
        ]
        y = Axis("percent", 0.0, 100.0) if is_ap else Axis("loss", 0.0)
        level = LEVELS.get(name.partition("_")[0], f"Added by the recipe: {name}")
        levels.setdefault(level, []).append((name, line_chart(f"{name} by step", lines, Axis("step"), y)))
    levels[LEVELS["val"]] = levels.pop(LEVELS["val"])  # last
    return [(level, charts) for level, charts in levels.items() if charts]


def confusion_chart(run: OneRun) -> Markup:
    """In shares of each row."""
    counts, protocol = run.analysis.confusion.counts.astype(np.float64), run.analysis.protocol
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = [*charted(run), len(protocol.names)]
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


# --- pictures ---

TrainingImages = Callable[[], Split]  # raises HdovdError if they cannot be read
LONGEST_SIDE_PX = 560
MOST_BOXES = 40  # of one picture, and all of `threshold` or more
TEXT_SHARE = 26  # letters are this part of the longer side high


def validation_cards(runs: Sequence[OneRun], count: int, threshold: float) -> list[dict[str, Any]]:
    """The first `count` images: those with the most objects lost by an adaptation first, then those whose novel objects
    are found or missed, the most of them foremost, then by place.
    """
    protocol, images = runs[0].analysis.protocol, runs[0].analysis.split.images
    novel = [sum(group_of(label, protocol) == "novel" for label in image.labels.tolist()) for image in images]
    lost = [sum(len(run.lost.intersection(image.annotation_ids.tolist())) for run in runs) for image in images]
    return [
        _validation_card(runs, place, threshold)
        for place in sorted(range(len(novel)), key=lambda place: (-lost[place], -novel[place]))[:count]
    ]


def _validation_card(runs: Sequence[OneRun], place: int, threshold: float) -> dict[str, Any]:
    analysis = runs[0].analysis
    protocol, verdicts = analysis.protocol, [run.analysis.image(place) for run in runs]
    truths = [truth for truth in verdicts[0].truths if truth.fate is not Kind.IGNORED]
    panels = [_panel(run, of_image, protocol, threshold) for run, of_image in zip(runs, verdicts, strict=True)]
    labels = [d.label for of_image in verdicts for d in of_image.detections if d.score >= threshold]
    events = {
        "objects missed that were found before the adaptation": any(
            run.lost & {t.annotation_id for t in truths} for run in runs
        ),
        "novel objects found": any(panel["novel_found"] for panel in panels),
        "novel objects missed": any(len(panel["novel_found"]) < panel["novel"] for panel in panels),
        "false novel detections": any(panel["novel_false"] for panel in panels),
        "runs that disagree on novel objects": any(
            panel["novel_found"] != panels[0]["novel_found"] for panel in panels
        ),
    }
    return _card(analysis.split, analysis.split.images[place], f"val-{place}") | {
        "classes": list(dict.fromkeys(protocol.names[label] for label in [*(t.label for t in truths), *labels])),
        "events": [event for event, there in events.items() if there],
        "panels": panels,
        "truth": [_box(t.box, protocol.names[t.label], group_of(t.label, protocol)) for t in truths],
    }


def _panel(run: OneRun, verdicts: ImageVerdicts, protocol: Protocol, threshold: float) -> dict[str, Any]:
    """One run's view of an image. A truth counts as found by a detection of `threshold` or more."""
    counted = [d for d in verdicts.detections if d.score >= threshold]
    found = {d.truth for d in counted if d.kind is Kind.RIGHT}
    objects = {k: t for k, t in enumerate(verdicts.truths) if t.fate is not Kind.IGNORED}
    novel = {k for k, t in objects.items() if group_of(t.label, protocol) == "novel"}
    boxes = [
        _box(t.box, "", group_of(t.label, protocol) + " missed", title=f"missed{why}: {protocol.names[t.label]}")
        for k, t in objects.items()
        if k not in found
        for why in [", and found before the adaptation" if t.annotation_id in run.lost else ""]
    ]
    for d in verdicts.detections[: max(MOST_BOXES, len(counted))][::-1]:  # the best on top
        text, wrong = f"{protocol.names[d.label]} {d.score:.2f}", d.kind not in (Kind.RIGHT, Kind.IGNORED)
        said = f"{text}: {d.kind}" + (" error" if wrong and d.kind is not Kind.DUPLICATE else "")
        boxes.append(_box(d.box, text, group_of(d.label, protocol) + (" wrong" if wrong else ""), d.score, said))
    return {
        "run": run.name,
        "boxes": boxes,
        "objects": len(objects),
        "found": len(found & objects.keys()),
        "novel": len(novel),
        "novel_found": found & novel,
        "lost": sum(k not in found and t.annotation_id in run.lost for k, t in objects.items()),
        "novel_false": any(
            group_of(d.label, protocol) == "novel" and d.kind not in (Kind.RIGHT, Kind.IGNORED) for d in counted
        ),
    }


def of_each(
    runs: Sequence[OneRun], make: Callable[[OneRun], Iterable[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What can be made of the runs, and why of the others it cannot."""
    made, reasons = list[dict[str, Any]](), list[str]()
    for run in runs:
        try:
            made += make(run)
        except HdovdError as error:
            reasons.append(f"{run.name}: {error}")
    return made, reasons


def pseudo_boxes(
    runs: Sequence[OneRun], training: TrainingImages, count: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Cards of the training images, for each features and weights that a run was trained with; and why there are none
    of a run.
    """
    parts = dict[tuple[Any, ...], dict[str, Any]]()

    def make(run: OneRun) -> Iterator[dict[str, Any]]:
        weight = Reliability.recorded(run.folder.record())
        if not uses_pseudo_boxes(run.run):
            raise HdovdError("it was trained without pseudo boxes")
        if (same := parts.get((run.run.cache_id, weight))) is not None:
            same["names"].append(run.name)
            return
        parts[run.run.cache_id, weight] = {
            "names": [run.name],
            "weight": weight,
            "cards": _pseudo_cards(run, training, count, weight, f"train{len(parts)}"),
        }
        yield parts[run.run.cache_id, weight]

    return of_each(runs, make)


def _pseudo_cards(
    run: OneRun, training: TrainingImages, count: int, weight: Reliability | None, key: str
) -> list[dict[str, Any]]:
    cache, protocol, split = cache_of(run.folder), run.analysis.protocol, training()
    failed, proposals = cache.failed(), cache.counts(Source.PROPOSAL)
    with_some = [image for image in split.images if image.id not in failed and proposals.get(image.id)]
    if not with_some:
        raise HdovdError("no training image has a proposal in the cache")
    return [
        _card(split, image, f"{key}-{image.id}")
        | _pseudo_rows(
            gather_view(cache, image.id, image, names=protocol.names, file=split.path(image), reliability=weight),
            protocol,
        )
        for place in np.unique(np.linspace(0, len(with_some) - 1, count).round().astype(int)).tolist()
        for image in [with_some[place]]
    ]


def _pseudo_rows(view: CacheView, protocol: Protocol) -> dict[str, Any]:
    base = [_box(row.box, row.name, "base") for row in view.rows if row.source is Source.BASE_BOX]
    proposals = [row for row in view.rows if row.source is not Source.BASE_BOX]
    rows = [
        {
            "noun": " + ".join(
                marked(noun.name, protocol.novel) + (f" ({noun.share:.2f})" if len(row.nouns) > 1 else "")
                for noun in row.nouns
            )
            or "no noun",
            "cosine": row.cosine,
            "weight": row.weight,
            "nearest": names_and_cosines(row.nearest, protocol.novel),
        }
        for row in proposals
    ]
    boxes = [
        _box(row.box, f"{number} {marked(row.name, protocol.novel)}", "pseudo", title=f"{number}: {told['noun']}")
        for number, (row, told) in enumerate(zip(proposals, rows, strict=True), 1)
    ]
    return {"boxes": base + boxes, "rows": rows}


def _card(split: Split, image: ImageBoxes, key: str) -> dict[str, Any]:
    return {
        "image_id": image.id,
        "key": key,
        "width": image.width,
        "height": image.height,
        "unit": round(max(image.width, image.height) / TEXT_SHARE, 1),
        "data": small_picture_data(
            read_image(split.path(image), image.width, image.height, exif=split.exif), LONGEST_SIDE_PX
        ),
    }


def _box(
    box: tuple[float, float, float, float], text: str, style: str, score: float | None = None, title: str = ""
) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "x": left,
        "y": top,
        "w": max(right - left, 0.0),
        "h": max(bottom - top, 0.0),
        "text": text,
        "style": style,
        "score": score,
        "title": title or text,
        "low": style.endswith("wrong"),
    }
