"""AP by both engines of `hdovd eval` on the same made-up detections: seconds, memory, and how far they differ.

    python benchmarks/run.py bench_eval [--rounds 3]
    python benchmarks/bench_eval.py --protocol ov-lvis --images 19809 --objects 244707 --detections 300

The defaults are COCO val2017 under the ov-coco protocol; the second line is LVIS v1's validation, federated, where
detections that stand near nothing are mostly of classes that their image is not judged by. The truth is an instances
file like COCO's, with outlines; detections stand near objects, best first, and elsewhere. Needs pip install
'hdovd[fast-eval]'.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from arguments import parsed, workplace

from hdovd.data import Protocol, load_protocol
from hdovd.evaluation import Engine, require
from hdovd.evaluation.coco import AveragePrecision, GroundTruth
from hdovd.pipelines.common.process import usable_cores

WIDTH, HEIGHT = 640, 480  # of every image, pixels
CROWDS = 0.01  # share of the objects, about COCO's
OUTLINE_POINTS = 24  # an object, about COCO's
NEAR = 0.6  # share of the detections that stand near an object
NEGATIVES = 4  # classes that an image of a federated protocol is known not to hold
UNFINISHED = 0.1  # share of an image's classes, there, whose objects are not all annotated
SHIFT = 0.12  # how far they are off, standard deviation in sides of the object


@dataclass(frozen=True)
class EvalBench:
    """`detections`: an image. `objects`: in all."""

    protocol: str = "ov-coco"
    images: int = 4_836
    objects: int = 36_000
    detections: int = 100
    rounds: int = 1
    seed: int = 0


def bench_eval(folder: Path, bench: EvalBench) -> dict[Engine, AveragePrecision]:
    """Make a truth and detections in `folder`, measure, and print. Raises HdovdError, before that, without one of the
    engines.
    """
    versions = {engine: require(engine) for engine in Engine}
    protocol, file = load_protocol(bench.protocol), folder / "instances.json"
    detections = make_eval_world(bench, protocol, file)
    image_ids, coco_ids = range(1, bench.images + 1), tuple(range(1, len(protocol.names) + 1))
    loads, evaluations = ({engine: list[float]() for engine in Engine} for _ in range(2))
    found: dict[Engine, AveragePrecision] = {}
    peaks: dict[Engine, float] = {}
    for _ in range(bench.rounds):
        for engine in Engine:
            forget_peak()
            since = time.perf_counter()
            truth = GroundTruth(file, coco_ids, image_ids, protocol, engine)
            loaded = time.perf_counter()
            found[engine] = truth.average_precision(detections)
            loads[engine].append(loaded - since)
            evaluations[engine].append(time.perf_counter() - loaded)
            peaks[engine] = peak_gb()
            del truth
    first, *_, last = Engine
    print(
        f"{bench.images:,d} images, {len(protocol.names)} classes, {bench.objects:,d} objects, {len(detections):,d} "
        f"detections; "
        f"{usable_cores()} cores, median of {bench.rounds}\n  {'':28s}{'truth, once':>14s}{'evaluation':>14s}"
        f"{'memory':>14s}"
    )
    for engine in Engine:
        print(
            f"  {f'{engine} {versions[engine]}':28s}{median(loads[engine]):12.2f} s{median(evaluations[engine]):12.2f} "
            f"s{peaks[engine]:11.2f} GB"
        )
    print(
        f"  {last} evaluates {median(evaluations[first]) / median(evaluations[last]):.1f} times as fast as {first}; "
        f"largest difference of any class's AP: {largest_difference(list(found.values())):.1e} percent"
    )
    return found


def forget_peak() -> None:
    """The most memory that this process held begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """The most memory that this process held since."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def largest_difference(found: list[AveragePrecision]) -> float:
    """From the first, of any class, in percent; infinite where only one of two has a value."""
    tables = [np.stack([ap.ap50, ap.ap]) for ap in found]
    if any((np.isnan(table) != np.isnan(tables[0])).any() for table in tables):
        return float("inf")
    return max(float(np.nanmax(np.abs(table - tables[0]), initial=0.0)) for table in tables)


def make_eval_world(bench: EvalBench, protocol: Protocol, file: Path) -> list[dict[str, Any]]:
    """Write an instances file with image ids and category ids from 1; returns detections in COCO results form.

    Objects fall on images at random and on classes as unevenly as COCO's; more than half of the detections are an
    object's class and place, less a shift, the others are anywhere. Scores tell the two apart in part, and some are
    equal.
    """
    rng = np.random.default_rng(bench.seed)
    classes = len(protocol.names)
    share = 1 / (np.arange(classes) + 3.0)  # a few classes hold most objects
    label = rng.permutation(classes)[rng.choice(classes, bench.objects, p=share / share.sum())]
    owner = np.sort(rng.integers(bench.images, size=bench.objects))
    boxes = _boxes(rng, bench.objects)
    annotations = [
        {
            "id": k + 1,
            "image_id": int(owner[k]) + 1,
            "category_id": int(label[k]) + 1,
            "bbox": boxes[k].round(2).tolist(),
            "area": float(boxes[k, 2] * boxes[k, 3] * 0.7),
            "iscrowd": int(rng.random() < CROWDS),
            "segmentation": [_outline(boxes[k])],
        }
        for k in range(bench.objects)
    ]
    file.write_text(
        json.dumps(
            {
                "images": [
                    {"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "width": WIDTH, "height": HEIGHT}
                    | (_known(rng, classes, np.unique(label[owner == i])) if protocol.federated else {})
                    for i in range(bench.images)
                ],
                "annotations": annotations,
                "categories": [{"id": k + 1, "name": name} for k, name in enumerate(protocol.names)],
            }
        )
    )
    first = np.searchsorted(owner, np.arange(bench.images + 1))
    detections: list[dict[str, Any]] = []
    for image in range(bench.images):
        held = np.arange(first[image], first[image + 1])
        near = round(bench.detections * NEAR) if len(held) else 0
        chosen = rng.choice(held, near) if near else held[:0]
        around = boxes[chosen] + rng.normal(0, SHIFT, (near, 4)) * boxes[chosen][:, [2, 3, 2, 3]]
        around[:, 2:] = np.maximum(around[:, 2:], 1)
        labels = np.concatenate([label[chosen], rng.integers(classes, size=bench.detections - near)])
        scores = np.concatenate([rng.beta(2, 2, near), rng.beta(1, 4, bench.detections - near)]).round(4)
        every = np.concatenate([around, _boxes(rng, bench.detections - near)])
        detections += [
            {"image_id": image + 1, "category_id": category + 1, "bbox": box, "score": score}
            for category, box, score in zip(labels.tolist(), every.tolist(), scores.tolist(), strict=True)
        ]
    return detections


def _known(rng: np.random.Generator, classes: int, there: np.ndarray) -> dict[str, list[int]]:
    """What federated annotations say of an image with objects of these classes."""
    absent = np.setdiff1d(rng.choice(classes, NEGATIVES, replace=False), there)
    unfinished = there[rng.random(len(there)) < UNFINISHED]
    return {"neg_category_ids": (absent + 1).tolist(), "not_exhaustive_category_ids": (unfinished + 1).tolist()}


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) x, y, width, height inside an image, small ones more often."""
    sides = np.exp(rng.uniform(np.log(10), np.log(300), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides), sides], axis=1)


def _outline(box: np.ndarray) -> list[float]:
    """An ellipse in the box: what a file of outlines weighs, for AP does not read it."""
    turn = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
    points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * box[2:] / 2 + box[:2] + box[2:] / 2
    return [float(v) for v in points.round(2).ravel()]


if __name__ == "__main__":
    with workplace() as place:
        bench_eval(place, parsed(EvalBench, __doc__))
