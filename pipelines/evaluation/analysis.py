"""All numbers about what a run detects and what it gets wrong, from its folder and the validation annotations; no model
is run.

From Python: `analyse(Path("run"), DataPaths(Path("COCO")))`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core import HdovdError
from hdovd.core.text_files import JsonStream, cut, read_json
from hdovd.data import DataPaths, Exif, ImageBoxes, Protocol, Split, group_labels, groups_of, load_protocol
from hdovd.data.coco import four_numbers, number
from hdovd.evaluation.coco import GroundTruth, found_of
from hdovd.evaluation.matching import (
    Confusion,
    Curves,
    Found,
    Matching,
    Objects,
    Reliability,
    Verdict,
    confusion,
    find_overlaps,
    match,
    precision_curves,
    score_reliability,
)
from hdovd.evaluation.tide import ErrorBreakdown, Errors, Kind, classify, count_errors
from hdovd.pipelines.evaluation.config import SHOWN_SCORE
from hdovd.pipelines.runs import RunFolder, Weights, read_run, weights_hash


def read_found(file: Path, split: Split) -> Found:
    """The detections of a run on the images of a split. Raises HdovdError for a file that is no such thing, naming the
    first fault.
    """
    images = {image.id for image in split.images}

    def rows() -> Iterator[dict[str, Any]]:
        for place, row in enumerate(JsonStream(file, "detections").items("list of detections: run hdovd eval again")):
            try:
                known = row["image_id"] in images and row["category_id"] in split.coco_ids
                sound = known and 0 <= number(row["score"]) <= 1 and np.isfinite(four_numbers(row["bbox"])).all()
            except (KeyError, TypeError):
                sound = False
            if not sound:
                raise HdovdError(
                    f"{file}: entry {place} is {cut(str(row), 120)}: expected an image and a class that "
                    f"{split.annotations} has by the protocol, a bbox of four numbers and a score in 0..1; give the "
                    f"data that the run was evaluated on, or run hdovd eval again"
                )
            yield row

    return found_of(rows(), split.coco_ids)


Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class DetectionVerdict:
    """`truth`: the place among the image's truths of the object it found or, if it is an error, that the error is
    about; None if there is none.
    """

    box: Box
    label: int
    score: float
    kind: Kind
    truth: int | None


@dataclass(frozen=True, slots=True)
class TruthVerdict:
    """`fate`: RIGHT: it was found; CLASSIFICATION or LOCALISATION: it was not, but a detection of another name stands
    at its place, or one of its name overlaps it too little; MISSED: none of these; IGNORED: a crowd. `detection`: the
    place among the image's detections of the one that found it or failed to; else None.
    """

    box: Box
    label: int
    annotation_id: int
    fate: Kind
    detection: int | None


@dataclass(frozen=True, slots=True)
class ImageVerdicts:
    """`detections` best first, `truths` in the order of the annotation file."""

    image: ImageBoxes
    detections: list[DetectionVerdict]
    truths: list[TruthVerdict]


def _corners(boxes: np.ndarray) -> list[Box]:
    return [(x, y, x + w, y + h) for x, y, w, h in boxes.tolist()]


AP_TOLERANCE = 1e-6  # percent; the same count in another order of sums differs by less


@dataclass(frozen=True, slots=True)
class RunAnalysis:
    """What `hdovd eval` found with one run's weights, taken apart.

    `metrics`: metrics.json, as it stands. `weights`: which of the run's. `split`: the validation images with their
    boxes, and `split.path(image)` a picture. `reliability`: by group. `found`, `objects`,
    `matching`, `detection_errors`: the flat arrays that the rest was counted from; `objects` in the file's order.
    """

    run: Path
    protocol: Protocol
    weights: Weights
    metrics: dict[str, Any]
    split: Split
    curves: Curves
    errors: ErrorBreakdown
    confusion: Confusion
    reliability: dict[str, Reliability]
    found: Found
    objects: Objects
    matching: Matching
    detection_errors: Errors

    def image(self, place: int) -> ImageVerdicts:
        """What became of the detections and objects of `split.images[place]`."""
        image, found, objects = self.split.images[place], self.found, self.objects
        mine = np.flatnonzero(found.image_ids == image.id)
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        # crowds that hold a whole image come after its objects
        truths = np.flatnonzero(objects.image_ids == image.id)[: len(image.annotation_ids)]
        place_of = {item: k for k, item in enumerate(truths.tolist())}
        detections = [
            DetectionVerdict(box, label, score, Kind(kind), place_of.get(item))
            for box, label, score, kind, item in zip(
                _corners(found.boxes[mine]),
                found.labels[mine].tolist(),
                found.scores[mine].tolist(),
                self.detection_errors.kind[mine].tolist(),
                self.detection_errors.item[mine].tolist(),
                strict=True,
            )
        ]
        shown = {detection: k for k, detection in enumerate(mine.tolist())}
        kind_of = dict(zip(mine.tolist(), self.detection_errors.kind[mine].tolist(), strict=True))
        alone = np.where(objects.crowd[truths], Kind.IGNORED, Kind.MISSED)
        by = np.maximum(self.matching.finder, self.detection_errors.mended_by)[truths]  # one of them at most
        return ImageVerdicts(
            image,
            detections,
            [
                TruthVerdict(box, label, number, Kind(kind_of.get(detection, other)), shown.get(detection))
                for box, label, number, other, detection in zip(
                    _corners(objects.boxes[truths]),
                    objects.labels[truths].tolist(),
                    image.annotation_ids.tolist(),
                    alone.tolist(),
                    by.tolist(),
                    strict=True,
                )
            ],
        )

    def to_tree(self) -> dict[str, Any]:
        """JSON values: "run", "protocol", "weights", "metrics", "curves", "errors", "confusion" and "reliability"."""
        return {
            "run": str(self.run),
            "protocol": self.protocol.to_dict(),
            "weights": self.weights.value,
            "metrics": self.metrics,
            "curves": self.curves.to_tree(),
            "errors": self.errors.to_tree(),
            "confusion": self.confusion.to_tree(),
            "reliability": {group: part.to_tree() for group, part in self.reliability.items()},
        }


def analyse(
    run: Path,
    data: DataPaths,
    *,
    protocol: str | None = None,
    confusion_score: float = SHOWN_SCORE,
    bins: int = 10,
    trust: bool = False,
) -> RunAnalysis:
    """Read a run's detections and take them apart. What is skipped in the annotations goes to `log`.

    Args:
        protocol: that the run was evaluated with, if it is not the run's own. confusion_score: detections below it are
        in no confusion. trust: as `RunFolder.trusted`.

    Raises HdovdError if the run was not evaluated, its detections are of other weights or other images, or they do not
    give the AP50 that metrics.json states.
    """
    folder = RunFolder.open(run, trusted=trust)
    counted = folder.protocol() if protocol is None else load_protocol(protocol)
    metrics = _metrics(folder)
    weights = Weights(metrics.get("weights", Weights.LAST))
    _check_weights(folder, weights, metrics)
    exif = read_run(run).settings.get("input.exif", Exif.APPLY)  # whatever else its recipe says: it may be older
    split = data.load("val2017", counted, base_only=False, exif=exif)
    if metrics.get("images") != len(split.images):
        raise HdovdError(
            f"{run} was evaluated on {metrics.get('images')} images, but {split.annotations} has {len(split.images)} "
            f"of protocol {counted.name}: give the data that it was evaluated on, or run hdovd eval again"
        )
    found = read_found(run / "detections.json", split)
    objects = GroundTruth(split.annotations, split.coco_ids, [image.id for image in split.images], counted).objects
    overlaps = find_overlaps(found, objects)
    matching = match(found, objects, overlaps, max(counted.max_detections))
    curves = precision_curves(found, objects, matching, counted)
    _check_ap(folder, metrics, curves)
    errors, right = classify(found, objects, overlaps, matching), matching.verdict == Verdict.RIGHT
    parts = {
        group: (matching.verdict != Verdict.IGNORED) & np.isin(found.labels, group_labels(counted, group))
        for group in groups_of(counted)
    }
    return RunAnalysis(
        run,
        counted,
        weights,
        metrics,
        split,
        curves,
        count_errors(found, objects, matching, errors, counted),
        confusion(found, objects, overlaps, counted, confusion_score),
        {group: score_reliability(found.scores[part], right[part], bins) for group, part in parts.items()},
        found,
        objects,
        matching,
        errors,
    )


def _metrics(run: RunFolder) -> dict[str, Any]:
    for name in ("metrics.json", "detections.json"):
        if not (run.path / name).is_file():
            raise HdovdError(f"{run.path} has no {name}: run hdovd eval {run.path} first")
    metrics = read_json(run.path / "metrics.json", "metrics")
    if (
        not isinstance(metrics, dict)
        or not isinstance(metrics.get("per_class"), dict)
        or (metrics.get("weights", Weights.LAST) not in [*Weights])
    ):
        raise HdovdError(f"{run.path / 'metrics.json'} is not what hdovd eval writes: run it again")
    return metrics


def _check_weights(run: RunFolder, weights: Weights, metrics: dict[str, Any]) -> None:
    """Raises HdovdError if the detections are of weights that are no longer there, as far as the evaluation noted their
    hash.
    """
    file = run.path / weights.file
    if not file.is_file():
        raise HdovdError(
            f"{run.path} was evaluated with its {weights.value} weights, but has no {weights.file} any more: run hdovd "
            f"eval {run.path} again, with those that it has"
        )
    known = metrics.get("weights_hash")
    if known is not None and known != (now := weights_hash(file)):
        raise HdovdError(
            f"{run.path / 'detections.json'} is of weights {known}, but {file} are {now} now: the run was trained on "
            f"since; run hdovd eval {run.path} --weights {weights.value} again"
        )


def _check_ap(run: RunFolder, metrics: dict[str, Any], curves: Curves) -> None:
    """Detections, metrics and annotations belong together if they give the AP50 that was stated."""
    for name, ap50 in zip(curves.protocol.names, curves.ap50().tolist(), strict=True):
        stated = metrics["per_class"].get(name, {}).get("ap50")
        if (stated is None) != np.isnan(ap50) or (stated is not None and abs(stated - ap50) > AP_TOLERANCE):
            raise HdovdError(
                f"{run.path}: detections.json gives {name!r} an AP50 of {ap50:.6f}, but metrics.json states {stated}: "
                f"they "
                "are not of one evaluation, or the annotations or the protocol are not those of it; run hdovd eval "
                "again"
            )
