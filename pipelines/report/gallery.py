"""The pictures of a report: validation images with truth and detections, training images with their pseudo boxes.

A card is plain values for the template: a picture as data, its size in pixels of the original image, and boxes in the
same pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol
from hdovd.evaluation.tide import Kind
from hdovd.pipelines.cache_tools.view import CacheView, Reliability, gather_view, marked, names_and_cosines
from hdovd.pipelines.common.charts import picture_data
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.settings import SWITCH
from hdovd.pipelines.evaluation.analysis import Fate, ImageVerdicts
from hdovd.pipelines.extraction.source import cache_of
from hdovd.pipelines.report.runs import OneRun, TrainingImages

LONGEST_SIDE_PX = 560
MOST_BOXES = 40  # of one picture, and all of `threshold` or more
TEXT_SHARE = 26  # letters are this part of the longer side high
FOUND, MISSED, FALSE, APART = (
    "novel objects found",
    "novel objects missed",
    "false novel detections",
    "runs that disagree on novel objects",
)


def validation_cards(runs: Sequence[OneRun], count: int, threshold: float) -> list[dict[str, Any]]:
    """The first `count` images: those whose novel objects are found or missed first, the most of them foremost, then by
    place.
    """
    analysis = runs[0].analysis
    novel = [
        sum(1 for label in image.labels.tolist() if label >= len(analysis.protocol.base))
        for image in analysis.split.images
    ]
    order = sorted(range(len(novel)), key=lambda place: -novel[place])[:count]
    return [_validation_card(runs, place, threshold) for place in order]


def _validation_card(runs: Sequence[OneRun], place: int, threshold: float) -> dict[str, Any]:
    analysis = runs[0].analysis
    protocol, image = analysis.protocol, analysis.split.images[place]
    card = _card(analysis.split, image, f"val-{place}")
    verdicts = [run.analysis.image(place) for run in runs]
    truths = [t for t in verdicts[0].truths if t.fate is not Fate.CROWD]
    panels = [_panel(run.name, of_image, protocol, threshold) for run, of_image in zip(runs, verdicts, strict=True)]
    names = [protocol.names[t.label] for t in truths]
    names += [protocol.names[d.label] for of_image in verdicts for d in of_image.detections if d.score >= threshold]
    novel_found = {panel["novel_which"] for panel in panels}
    events = [
        name
        for name, there in (
            (FOUND, any(panel["novel_found"] for panel in panels)),
            (MISSED, any(panel["novel_found"] < panel["novel_objects"] for panel in panels)),
            (FALSE, any(panel["novel_false"] for panel in panels)),
            (APART, len(novel_found) > 1),
        )
        if there
    ]
    return card | {
        "classes": list(dict.fromkeys(names)),
        "events": events,
        "panels": panels,
        "truth": [_box(t.box, protocol.names[t.label], _style(t.label, protocol)) for t in truths],
    }


def _panel(name: str, verdicts: ImageVerdicts, protocol: Protocol, threshold: float) -> dict[str, Any]:
    """One run's view of an image. A truth counts as found by a detection of `threshold` or more."""
    found = {
        t for d in verdicts.detections if d.kind is Kind.RIGHT and d.score >= threshold and (t := d.truth) is not None
    }
    objects = {k: t for k, t in enumerate(verdicts.truths) if t.fate is not Fate.CROWD}
    novel = {k for k, t in objects.items() if t.label >= len(protocol.base)}
    boxes = [
        _box(t.box, "", _style(t.label, protocol) + " missed", title=f"missed: {protocol.names[t.label]}")
        for k, t in objects.items()
        if k not in found
    ]
    shown = max(MOST_BOXES, sum(d.score >= threshold for d in verdicts.detections))
    for d in verdicts.detections[:shown][::-1]:  # the best on top
        wrong = d.kind not in (Kind.RIGHT, Kind.IGNORED)
        said = f"{protocol.names[d.label]} {d.score:.2f}: {d.kind}" + (
            " error" if wrong and d.kind is not Kind.DUPLICATE else ""
        )
        style = _style(d.label, protocol) + (" wrong" if wrong else "")
        boxes.append(_box(d.box, f"{protocol.names[d.label]} {d.score:.2f}", style, d.score, said))
    false = sum(
        1
        for d in verdicts.detections
        if d.score >= threshold and d.label >= len(protocol.base) and d.kind not in (Kind.RIGHT, Kind.IGNORED)
    )
    return {
        "run": name,
        "boxes": boxes,
        "objects": len(objects),
        "found": len(found & objects.keys()),
        "novel_objects": len(novel),
        "novel_found": len(found & novel),
        "novel_which": frozenset(found & novel),
        "novel_false": false,
    }


def pseudo_boxes(
    runs: Sequence[OneRun], training: TrainingImages, count: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Cards of the training images, for each features and weights that a run was trained with; and why there are none
    of a run.
    """
    parts: dict[tuple[Any, ...], dict[str, Any]] = {}
    reasons: list[str] = []
    if not count:
        return [], ["Pseudo boxes were left out."]
    for run in runs:
        if not any(run.run.settings.get(f"loss.{level}{SWITCH}") for level in ("instance", "class")):
            reasons.append(f"{run.name} was trained without pseudo boxes.")
            continue
        weight = _weight(run)
        key = (run.run.cache_id, weight)
        if key in parts:
            parts[key]["names"].append(run.name)
            continue
        try:
            parts[key] = {
                "names": [run.name],
                "weight": weight,
                "cards": _pseudo_cards(run, training, count, weight, f"train{len(parts)}"),
            }
        except HdovdError as error:
            reasons.append(f"{run.name}: {error}")
    most = " or ".join(
        sorted(
            {
                str(run.run.settings["pseudo_boxes.max_per_image"])
                for run in runs
                if run.run.settings.get("pseudo_boxes.max_per_image")
            }
        )
    )
    for part in parts.values():
        weight = part["weight"]
        by = (
            ""
            if weight is None
            else (
                f" Weight of a label: {weight.scale:.3g} * sigmoid((cosine - {weight.centre:.4g}) / "
                f"{weight.width:.3g}), from {weight.source}."
            )
        )
        part["note"] = (
            f"What {', '.join(part['names'])} learned from besides base boxes (blue): proposals (green), each with the "
            f"noun that CLIP finds most like its crop; * marks a novel class. The images are spread evenly over the "
            f"training images that have proposals; at most {most} proposals of an image are used in a step.{by}"
        )
    return list(parts.values()), reasons


def _weight(run: OneRun) -> Reliability | None:
    """What the run was trained with, as it recorded it."""
    recorded = run.folder.record().get("reliability")
    if not recorded:
        return None
    return Reliability(
        float(recorded["centre"]), float(recorded["width"]), float(recorded["scale"]), str(recorded["source"])
    )


def _pseudo_cards(
    run: OneRun, training: TrainingImages, count: int, weight: Reliability | None, key: str
) -> list[dict[str, Any]]:
    cache, protocol, split = cache_of(run.folder), run.analysis.protocol, training.split
    failed, proposals = cache.failed(), cache.counts(Source.PROPOSAL)
    with_some = [image for image in split.images if image.id not in failed and proposals.get(image.id)]
    if not with_some:
        raise HdovdError("no training image has a proposal in the cache")
    cards = []
    for place in np.unique(np.linspace(0, len(with_some) - 1, count).round().astype(int)).tolist():
        image = with_some[place]
        view = gather_view(cache, image.id, image, names=protocol.names, file=split.path(image), reliability=weight)
        cards.append(_card(split, image, f"{key}-{image.id}") | _pseudo_rows(view, protocol))
    return cards


def _pseudo_rows(view: CacheView, protocol: Protocol) -> dict[str, Any]:
    boxes, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for row in view.rows:
        if row.source is Source.BASE_BOX:
            boxes.append(_box(row.box, row.name, "base"))
            continue
        number = len(rows) + 1
        parts = [
            marked(noun.name, protocol.novel) + (f" ({noun.share:.2f})" if len(row.nouns) > 1 else "")
            for noun in row.nouns
        ]
        nouns = " + ".join(parts) or "no noun"
        boxes.append(
            _box(row.box, f"{number} {marked(row.name, protocol.novel)}", "pseudo", title=f"{number}: {nouns}")
        )
        rows.append(
            {
                "number": number,
                "noun": nouns,
                "cosine": row.cosine,
                "weight": row.weight,
                "nearest": names_and_cosines(row.nearest, protocol.novel),
            }
        )
    return {"boxes": boxes, "rows": rows}


def _card(split: Split, image: ImageBoxes, key: str) -> dict[str, Any]:
    width, height = image.width, image.height
    picture = read_image(split.path(image), width, height, exif=split.exif)
    picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
    return {
        "image_id": image.id,
        "key": key,
        "width": width,
        "height": height,
        "unit": round(max(width, height) / TEXT_SHARE, 1),
        "data": picture_data(picture, quality=82),
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


def _style(label: int, protocol: Protocol) -> str:
    return "novel" if label >= len(protocol.base) else "base"
