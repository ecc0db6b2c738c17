"""How many objects class-agnostic proposals find: average recall of networks side by side, of base and of novel
objects.

Counted over what a network proposes, before proposals that overlap base boxes are taken out. Novel objects are counted
as a diagnosis alone: no stage chooses anything by them.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError
from hdovd.core.log import log, quiet
from hdovd.data.coco import Split, read_instances
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.evaluation.recall import THRESHOLDS, found_at, recall
from hdovd.modeling.proposals.base import ProposalNetwork
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import Team, placed, team
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.networks import Pictures, found_in, load_network, trained_network
from hdovd.pipelines.proposals.propose import stop_if_asked

MOST = (5, 10, 30, 100)  # proposals an image
GROUPS = ("base", "novel")


@dataclass(frozen=True, slots=True)
class Recall:
    """Average recall of one network in percent, by group ("base", "novel") and number of proposals an image; NaN
    without objects.

    `objects`: by group. `proposals`: an image, in the mean, of all that the network has.
    """

    name: str
    ar50: dict[str, dict[int, float]]
    ar: dict[str, dict[int, float]]
    objects: dict[str, int]
    images: int
    proposals: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.name,
            "images": self.images,
            "proposals_per_image": self.proposals,
            "objects": self.objects,
            "ar50": _without_nan(self.ar50),
            "ar50_95": _without_nan(self.ar),
            "novel": "a diagnosis: never used for choosing",
        }


def _without_nan(rows: dict[str, dict[int, float]]) -> dict[str, dict[int, float | None]]:
    """JSON knows no NaN."""
    return {
        group: {most: None if value != value else value for most, value in values.items()}
        for group, values in rows.items()
    }


def recall_report(job: ProposeConfig) -> list[Recall]:
    """Train or load the networks, count what they find and say it; with `job.out` also in NAME.recall.json beside it.

    Raises HdovdError for bad input or a validation picture that cannot be read, and Stopped if a signal ended it.
    """
    job.check()
    with team(job.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        assert job.validation is not None  # as checked
        protocol, found = load_protocol(job.protocol), list[Recall]()
        validation = without_crowds(
            job.validation.load("val2017", protocol, base_only=False, exif=job.recipe.input.exif)
        )

        def count(name: str, network: ProposalNetwork) -> None:
            found.append(_recall(name, network, validation, protocol, job, us, stop))

        if job.trained:
            split = job.data.load("train2017", protocol, base_only=True, exif=job.recipe.input.exif)
            for detector in job.trained:
                count(detector.value, trained_network(job, detector, split, us, stop)[0])
        for file in job.checkpoint:
            network, origin = load_network(file, job.recipe)
            count(f"{origin['detector']} {file.name}", placed(network, us.device).eval())
        if us.leads and job.out is not None:
            file = job.beside("recall.json")
            write_text(file, json.dumps([one.to_dict() for one in found], indent=1))
            log(f"wrote {file}")
        log(recall_table(found))
        return found


def without_crowds(split: Split) -> Split:
    """A box around many objects is none that a proposal could find."""
    found = read_instances(split.annotations)
    crowds = {number for number, crowd in zip(found.ids, found.crowd, strict=True) if crowd}
    keep = [
        np.array([number not in crowds for number in image.annotation_ids.tolist()], bool) for image in split.images
    ]
    images = [
        replace(image, boxes=image.boxes[rows], labels=image.labels[rows], annotation_ids=image.annotation_ids[rows])
        for image, rows in zip(split.images, keep, strict=True)
    ]
    return replace(split, images=images)


def _recall(
    name: str,
    network: ProposalNetwork,
    split: Split,
    protocol: Protocol,
    job: ProposeConfig,
    us: Team,
    stop: StopSignal,
) -> Recall:
    numbers = list(range(len(split.images)))[us.rank :: us.world]
    found: dict[str, list[np.ndarray]] = {group: [] for group in GROUPS}
    count = 0
    results = found_in(Pictures(split, job.recipe), numbers, network, us, f"recall {name}")
    for number, (picture, boxes, _) in zip(numbers, results, strict=True):
        stop_if_asked(stop, "counting; networks that were trained are kept")
        if picture.problem:
            raise HdovdError(f"{picture.problem}; recall without it would be another data set's")
        image, best = split.images[number], boxes[: max(MOST)].numpy()
        is_base = image.labels < len(protocol.base)
        for group, rows in (("base", is_base), ("novel", ~is_base)):
            found[group].append(found_at(best, image.boxes[rows]))
        count += len(boxes)
    shares = us.gather((found, count))
    every = {group: [one for part, _ in shares for one in part[group]] for group in GROUPS}
    at = {group: {most: recall(every[group], most) * 100 for most in MOST} for group in GROUPS}
    return Recall(
        name,
        {group: {most: float(values[0]) for most, values in rows.items()} for group, rows in at.items()},
        {group: {most: float(values.mean()) for most, values in rows.items()} for group, rows in at.items()},
        {group: sum(one.shape[1] for one in every[group]) for group in GROUPS},
        len(split.images),
        sum(n for _, n in shares) / len(split.images),
    )


def recall_table(found: list[Recall]) -> str:
    """Networks side by side, base and novel, as text."""
    first, width = found[0], max(len(one.name) for one in found)
    heads = [f"AR@{most}" for most in MOST]
    base, novel = (first.objects[group] for group in GROUPS)
    lines = [
        f"Average recall in percent, {first.images} pictures, {base} base and {novel} novel objects.",
        "Novel is a diagnosis: choose nothing by it.",
        f"{'':{width}s} "
        f"{'':6s}{'IoU 0.5':>{8 * len(MOST)}s}{f'IoU {THRESHOLDS[0]}:{THRESHOLDS[-1]}':>{8 * len(MOST)}s}",
        f"{'':{width}s} {'':6s}" + "".join(f"{head:>8s}" for head in heads * 2),
    ]
    for one in found:
        for group in GROUPS:
            values = [*one.ar50[group].values(), *one.ar[group].values()]
            lines.append(
                f"{one.name:{width}s} {group:6s}" + "".join(f"{'none' if v != v else f'{v:.1f}':>8s}" for v in values)
            )
    return "\n".join(lines)
