"""All numbers about what a run detects and what it gets wrong, from its folder and the validation annotations; no model
is run.

From Python: `analyse(Path("run"), DataPaths(Path("COCO")))`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError
from hdovd.core.text_files import JsonStream, cut, read_json, shown
from hdovd.data.coco import DataPaths, Exif, ImageBoxes, Split, four_numbers, number
from hdovd.data.protocol import Protocol, group_labels, groups_of, load_protocol
from hdovd.evaluation.coco import GroundTruth, found_of
from hdovd.evaluation.curves import Confusion, Curves, Reliability, confusion, precision_curves, score_reliability
from hdovd.evaluation.matching import Found, Matching, Objects, Verdict, find_overlaps, match, paired_ious
from hdovd.evaluation.tide import ErrorBreakdown, Errors, Kind, classify, count_errors
from hdovd.pipelines.evaluation.config import SHOWN_SCORE
from hdovd.pipelines.runs.folder import RunFolder, Weights, weights_hash
from hdovd.pipelines.runs.listing import read_run


def read_found(file: Path, split: Split) -> Found:
    """The detections of a run on the images of a split. Raises HdovdError for a file that is no such thing, naming the
    first fault.
    """
    images, classes = {image.id for image in split.images}, set(split.coco_ids)

    def rows() -> Iterator[dict[str, Any]]:
        for place, row in enumerate(JsonStream(file, "detections").items("list of detections: run hdovd eval again")):
            if fault := _fault(row, images, classes, split):
                raise HdovdError(
                    f"{file}: entry {place}: {fault}; give the data that the run was evaluated on, or run hdovd eval "
                    f"again"
                )
            yield row

    return found_of(rows(), split.coco_ids)


def _fault(row: Any, images: set[int], classes: set[int], split: Split) -> str:
    if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
        return "a detection has image_id, category_id, bbox and score"
    if type(row["image_id"]) is not int or row["image_id"] not in images:
        return f"it is for image {shown(row['image_id'])}, of which {split.annotations} holds no object of the protocol's classes"  # noqa: E501
    if type(row["category_id"]) is not int or row["category_id"] not in classes:
        return f"category {shown(row['category_id'])} is none of the protocol's"
    box, score = row["bbox"], row["score"]
    if not np.isfinite(four_numbers(box)).all():
        return f"the box is not four numbers: {cut(str(box))}"
    return "" if 0 <= number(score) <= 1 else f"the score is not in 0..1: {shown(score)}"


Box = tuple[float, float, float, float]


class Fate(StrEnum):
    """Of an object: FOUND; MISNAMED and MISPLACED: not found, but a detection of another name stands at its place, or
    one of its name overlaps it too little; MISSED: none of these; CROWD: not counted.
    """

    FOUND = "found"
    MISNAMED = "misnamed"
    MISPLACED = "misplaced"
    MISSED = "missed"
    CROWD = "crowd"


@dataclass(frozen=True, slots=True)
class DetectionVerdict:
    """`truth`: the place among the image's truths of the object it found or, if it is an error, that the error is
    about; None if there is none. `iou` with it, 0 without one.
    """

    box: Box
    label: int
    score: float
    kind: Kind
    truth: int | None
    iou: float


@dataclass(frozen=True, slots=True)
class TruthVerdict:
    """`detection`: the place among the image's detections of the one that found it or, MISNAMED or MISPLACED, that
    failed to; else None.
    """

    box: Box
    label: int
    annotation_id: int
    fate: Fate
    detection: int | None


@dataclass(frozen=True, slots=True)
class ImageVerdicts:
    """`detections` best first, `truths` in the order of the annotation file."""

    image: ImageBoxes
    detections: list[DetectionVerdict]
    truths: list[TruthVerdict]

    def to_tree(self) -> dict[str, Any]:
        """The fields as JSON values; kinds and fates by name, boxes to a hundredth of a pixel, scores and IoU to five
        digits.
        """
        return {
            "image_id": self.image.id,
            "file_name": self.image.file_name,
            "width": self.image.width,
            "height": self.image.height,
            "detections": [
                {
                    "box": [round(v, 2) for v in d.box],
                    "label": d.label,
                    "score": round(d.score, 5),
                    "kind": d.kind.value,
                    "truth": d.truth,
                    "iou": round(d.iou, 5),
                }
                for d in self.detections
            ],
            "truths": [
                {
                    "box": [round(v, 2) for v in t.box],
                    "label": t.label,
                    "annotation_id": t.annotation_id,
                    "fate": t.fate.value,
                    "detection": t.detection,
                }
                for t in self.truths
            ],
        }


def verdicts_on(image: ImageBoxes, found: Found, objects: Objects, matching: Matching, errors: Errors) -> ImageVerdicts:
    """What became of an image's detections and objects; `objects` holds those of the image in its order."""
    mine = np.flatnonzero(found.image_ids == image.id)
    mine = mine[np.argsort(-found.scores[mine], kind="stable")]
    truths = np.flatnonzero(objects.image_ids == image.id)[: len(image.annotation_ids)]  # not a whole image's crowds
    about = errors.item[mine]
    has = about >= 0
    ious = np.zeros(len(mine))
    ious[has] = paired_ious(found.boxes[mine[has]], objects.boxes[about[has]], objects.crowd[about[has]])
    place = {item: k for k, item in enumerate(truths.tolist())}
    detections = [
        DetectionVerdict(box, label, score, Kind(kind), place.get(item), iou)
        for box, label, score, kind, item, iou in zip(
            _corners(found.boxes[mine]),
            found.labels[mine].tolist(),
            found.scores[mine].tolist(),
            errors.kind[mine].tolist(),
            about.tolist(),
            ious.tolist(),
            strict=True,
        )
    ]
    shown = {detection: k for k, detection in enumerate(mine.tolist())}
    finder, mender = matching.finder[truths], errors.mended_by[truths]  # of an object one of them at most
    misnamed = np.isin(mender, mine[errors.kind[mine] == Kind.CLASSIFICATION])
    tests = [finder >= 0, misnamed, mender >= 0, objects.crowd[truths]]
    fates = np.select(tests, [Fate.FOUND, Fate.MISNAMED, Fate.MISPLACED, Fate.CROWD], Fate.MISSED)
    return ImageVerdicts(
        image,
        detections,
        [
            TruthVerdict(box, label, number, Fate(fate), shown.get(by))
            for box, label, number, fate, by in zip(
                _corners(objects.boxes[truths]),
                objects.labels[truths].tolist(),
                image.annotation_ids.tolist(),
                fates.tolist(),
                np.maximum(finder, mender).tolist(),
                strict=True,
            )
        ],
    )


def _corners(boxes: np.ndarray) -> list[Box]:
    return [(x, y, x + w, y + h) for x, y, w, h in boxes.tolist()]


AP_TOLERANCE = 1e-6  # percent; the same count in another order of sums differs by less


@dataclass(frozen=True, slots=True)
class RunAnalysis:
    """What `hdovd eval` found with one run's weights, taken apart.

    `metrics`: metrics.json, as it stands. `weights`: which of the run's. `split`: the validation images with their
    boxes, and `split.path(image)` a picture. `reliability`: by group. `found`, `objects`,
    `matching`, `detection_errors`: the flat arrays that the rest was counted from; `objects` image by image in the
    split's order.
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
        return verdicts_on(self.split.images[place], self.found, self.objects, self.matching, self.detection_errors)

    def to_tree(self, images: Iterable[int] = ()) -> dict[str, Any]:
        """JSON values: "run", "protocol", "weights", "metrics", "curves", "errors", "confusion", "reliability", and
        "images": the verdicts on those at these places of the split (on all of COCO's they are some 70 MB).
        """
        return {
            "run": str(self.run),
            "protocol": self.protocol.to_dict(),
            "weights": self.weights.value,
            "metrics": self.metrics,
            "curves": self.curves.to_tree(),
            "errors": self.errors.to_tree(),
            "confusion": self.confusion.to_tree(),
            "reliability": {group: part.to_tree() for group, part in self.reliability.items()},
            "images": [self.image(place).to_tree() for place in images],
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
    ignored = (
        read_run(run).settings.get("input.exif") == Exif.IGNORE
    )  # whatever else its recipe says: of another version perhaps
    split = data.load("val2017", counted, base_only=False, exif=Exif.IGNORE if ignored else Exif.APPLY)
    if metrics.get("images") != len(split.images):
        raise HdovdError(
            f"{run} was evaluated on {metrics.get('images')} images, but {split.annotations} has {len(split.images)} "
            f"of protocol {counted.name}: give the data that it was evaluated on, or run hdovd eval again"
        )
    found = read_found(run / "detections.json", split)
    objects = _in_order(
        GroundTruth(split.annotations, split.coco_ids, [image.id for image in split.images], counted).objects, split
    )
    overlaps = find_overlaps(found, objects)
    matching = match(found, objects, overlaps, max(counted.max_detections))
    curves = precision_curves(found, objects, matching, counted)
    _check_ap(folder, metrics, curves)
    errors = classify(found, objects, overlaps, matching)
    return RunAnalysis(
        run,
        counted,
        weights,
        metrics,
        split,
        curves,
        count_errors(found, objects, matching, errors, counted),
        confusion(found, objects, overlaps, counted, confusion_score),
        _reliability(found, matching, counted, bins),
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


def _in_order(objects: Objects, split: Split) -> Objects:
    """Image by image, as the split has them; those of an image stay in the file's order, which is the split's, before
    crowds that hold the whole image.
    """
    place = {image.id: k for k, image in enumerate(split.images)}
    order = np.argsort([place[i] for i in objects.image_ids.tolist()], kind="stable")
    columns = {name: getattr(objects, name)[order] for name in ("image_ids", "boxes", "labels", "crowd")}
    return replace(objects, **columns)


def _reliability(found: Found, matching: Matching, protocol: Protocol, bins: int) -> dict[str, Reliability]:
    counted = matching.verdict != Verdict.IGNORED
    parts = {group: counted & np.isin(found.labels, group_labels(protocol, group)) for group in groups_of(protocol)}
    return {
        group: score_reliability(found.scores[part], matching.verdict[part] == Verdict.RIGHT, bins)
        for group, part in parts.items()
    }
