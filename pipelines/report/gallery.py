"""The pictures of a report: validation images with truth and detections, training images with their pseudo boxes.

A card is plain values for the template: a picture as data, its size in pixels of the original image, and boxes in the
same pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol
from hdovd.evaluation.groups import group_of
from hdovd.evaluation.tide import Kind
from hdovd.pipelines.cache_tools.view import CacheView, Reliability, gather_view, marked, names_and_cosines
from hdovd.pipelines.common.charts import picture_data
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.evaluation.analysis import Fate, ImageVerdicts
from hdovd.pipelines.extraction.source import cache_of
from hdovd.pipelines.report.figures import formula, uses_pseudo_boxes, weight_of
from hdovd.pipelines.report.runs import OneRun

TrainingImages = Callable[[], Split]  # raises HdovdError if they cannot be read
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
    protocol, images = runs[0].analysis.protocol, runs[0].analysis.split.images
    novel = [sum(group_of(label, protocol) == "novel" for label in image.labels.tolist()) for image in images]
    return [
        _validation_card(runs, place, threshold)
        for place in sorted(range(len(novel)), key=lambda place: -novel[place])[:count]
    ]


def _validation_card(runs: Sequence[OneRun], place: int, threshold: float) -> dict[str, Any]:
    analysis = runs[0].analysis
    protocol, verdicts = analysis.protocol, [run.analysis.image(place) for run in runs]
    truths = [truth for truth in verdicts[0].truths if truth.fate is not Fate.CROWD]
    panels = [_panel(run.name, of_image, protocol, threshold) for run, of_image in zip(runs, verdicts, strict=True)]
    labels = [d.label for of_image in verdicts for d in of_image.detections if d.score >= threshold]
    events = {
        FOUND: any(panel["novel_found"] for panel in panels),
        MISSED: any(len(panel["novel_found"]) < panel["novel"] for panel in panels),
        FALSE: any(panel["novel_false"] for panel in panels),
        APART: any(panel["novel_found"] != panels[0]["novel_found"] for panel in panels),
    }
    return _card(analysis.split, analysis.split.images[place], f"val-{place}") | {
        "classes": list(dict.fromkeys(protocol.names[label] for label in [*(t.label for t in truths), *labels])),
        "events": [event for event, there in events.items() if there],
        "panels": panels,
        "truth": [_box(t.box, protocol.names[t.label], group_of(t.label, protocol)) for t in truths],
    }


def _panel(name: str, verdicts: ImageVerdicts, protocol: Protocol, threshold: float) -> dict[str, Any]:
    """One run's view of an image. A truth counts as found by a detection of `threshold` or more."""
    counted = [d for d in verdicts.detections if d.score >= threshold]
    found = {d.truth for d in counted if d.kind is Kind.RIGHT}
    objects = {k: t for k, t in enumerate(verdicts.truths) if t.fate is not Fate.CROWD}
    novel = {k for k, t in objects.items() if group_of(t.label, protocol) == "novel"}
    boxes = [
        _box(t.box, "", group_of(t.label, protocol) + " missed", title=f"missed: {protocol.names[t.label]}")
        for k, t in objects.items()
        if k not in found
    ]
    for d in verdicts.detections[: max(MOST_BOXES, len(counted))][::-1]:  # the best on top
        text, wrong = f"{protocol.names[d.label]} {d.score:.2f}", d.kind not in (Kind.RIGHT, Kind.IGNORED)
        said = f"{text}: {d.kind}" + (" error" if wrong and d.kind is not Kind.DUPLICATE else "")
        boxes.append(_box(d.box, text, group_of(d.label, protocol) + (" wrong" if wrong else ""), d.score, said))
    return {
        "run": name,
        "boxes": boxes,
        "objects": len(objects),
        "found": len(found & objects.keys()),
        "novel": len(novel),
        "novel_found": found & novel,
        "novel_false": any(
            group_of(d.label, protocol) == "novel" and d.kind not in (Kind.RIGHT, Kind.IGNORED) for d in counted
        ),
    }


def pseudo_boxes(
    runs: Sequence[OneRun], training: TrainingImages, count: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Cards of the training images, for each features and weights that a run was trained with; and why there are none
    of a run.
    """
    parts, reasons = dict[tuple[Any, ...], dict[str, Any]](), list[str]()
    if not count:
        return [], ["Pseudo boxes were left out."]
    for run in runs:
        weight = weight_of(run)
        key = (run.run.cache_id, weight)
        if not uses_pseudo_boxes(run.run):
            reasons.append(f"{run.name} was trained without pseudo boxes.")
        elif key in parts:
            parts[key]["names"].append(run.name)
        else:
            try:
                cards = _pseudo_cards(run, training, count, weight, f"train{len(parts)}")
                parts[key] = {"names": [run.name], "weight": weight, "cards": cards}
            except HdovdError as error:
                reasons.append(f"{run.name}: {error}")
    mosts = {str(most) for run in runs if (most := run.run.settings.get("pseudo_boxes.max_per_image"))}
    for part in parts.values():
        part["note"] = (
            f"What {', '.join(part['names'])} learned from besides base boxes (blue): proposals (green), each with the "
            f"noun that CLIP finds most like its crop; * marks a novel class. The images are spread evenly over the "
            f"training images that have proposals; at most {' or '.join(sorted(mosts))} proposals of an image are used "
            f"in a step."
        ) + (f" Weight of a label: {formula(part['weight'])}." if part["weight"] else "")
    return list(parts.values()), reasons


def _pseudo_cards(
    run: OneRun, training: TrainingImages, count: int, weight: Reliability | None, key: str
) -> list[dict[str, Any]]:
    cache, protocol, split = cache_of(run.folder), run.analysis.protocol, training()
    failed, proposals = cache.failed(), cache.counts(Source.PROPOSAL)
    with_some = [image for image in split.images if image.id not in failed and proposals.get(image.id)]
    if not with_some:
        raise HdovdError("no training image has a proposal in the cache")
    cards = []
    for place in np.unique(np.linspace(0, len(with_some) - 1, count).round().astype(int)).tolist():
        image = with_some[place]
        cards.append(
            _card(split, image, f"{key}-{image.id}")
            | _pseudo_rows(
                gather_view(cache, image.id, image, names=protocol.names, file=split.path(image), reliability=weight),
                protocol,
            )
        )
    return cards


def _pseudo_rows(view: CacheView, protocol: Protocol) -> dict[str, Any]:
    base = [_box(row.box, row.name, "base") for row in view.rows if row.source is Source.BASE_BOX]
    boxes, rows = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, row in enumerate((row for row in view.rows if row.source is not Source.BASE_BOX), start=1):
        nouns = " + ".join(
            marked(noun.name, protocol.novel) + (f" ({noun.share:.2f})" if len(row.nouns) > 1 else "")
            for noun in row.nouns
        )
        boxes.append(
            _box(
                row.box,
                f"{number} {marked(row.name, protocol.novel)}",
                "pseudo",
                title=f"{number}: {nouns or 'no noun'}",
            )
        )
        rows.append(
            {
                "number": number,
                "noun": nouns or "no noun",
                "cosine": row.cosine,
                "weight": row.weight,
                "nearest": names_and_cosines(row.nearest, protocol.novel),
            }
        )
    return {"boxes": base + boxes, "rows": rows}


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
