"""What became of classes: AP50 of runs before and after an adaptation, and the objects that are missed since."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import quiet
from hdovd.data.coco import DataPaths, read_instances
from hdovd.evaluation.coco import found_of
from hdovd.evaluation.matching import find_overlaps, match
from hdovd.modeling.boxes import Detections
from hdovd.pipelines.adaptation.data import groups_between
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.evaluation.config import SHOWN_SCORE, EvalConfig
from hdovd.pipelines.evaluation.evaluate import Validation, load_detector, results
from hdovd.pipelines.runs.folder import RunFolder, Weights
from hdovd.pipelines.runs.listing import ap, table_lines


def compare(job: EvalConfig) -> str:
    """`hdovd eval --before`: `retention` of a run on one data set. Raises HdovdError for bad input."""
    paths, weights = {"before": job.before or job.run, "after": job.run}, {"after": job.weights}
    runs = {which: RunFolder.open(path, trusted=job.trust) for which, path in paths.items()}
    return retention(runs, [job.data], pick_device(job.device), weights, job.batch_size, job.workers)


def retention(
    runs: Mapping[str, RunFolder],
    data: Sequence[DataPaths],
    device: torch.device,
    weights: Mapping[str, Weights] = {},
    batch_size: int = 16,
    workers: int | None = None,
) -> str:
    """AP50 of each run ("before", "after" and others) on each data set, by groups of classes, and the objects that were
    found before and are missed after, by image and annotation id: written into the run after, and returned as a table.
    Counted are those of its classes that the annotations know, by all runs alike: one without boxes before is novel to
    the run before, and found by its name.

    Args:
        weights: which of a run's, where it is not the last.

    Raises HdovdError for data without any of the classes.
    """
    before, after = runs["before"].protocol(), runs["after"].protocol()
    rows, lines, tree = list[list[str]](), list[str](), list[dict[str, Any]]()
    texts = dict(zip(after.names, runs["after"].class_embeddings().float(), strict=True))
    for one in data:
        known = read_instances(*one.locate("val2017"))
        names = [name for name in after.names if name in known.names.values()]
        if not names:
            raise HdovdError(f"{known.file} knows none of the {len(after.names)} classes of {runs['after'].path}")
        of = {group: tuple(n for n in own if n in names) for group, own in groups_between(before, after).items()}
        ap50, seen, groups = dict[str, Any](), dict[str, set[Any]](), {group: own for group, own in of.items() if own}
        for which, run in runs.items():
            own = (before if which == "before" else after).base
            protocol = replace(
                after,
                base=tuple(name for name in names if name in own),
                novel=tuple(name for name in names if name not in own),
                groups=groups,
                federated=bool(known.absent),
            )
            with quiet(which != "before"):  # what is left out is the same for all
                validation = Validation(
                    one, protocol, device, exif=run.recipe().input.exif, batch_size=batch_size, workers=workers
                )
            every = torch.stack([texts[name] for name in protocol.names])
            said = validation.run(
                load_detector(run, every.shape[1], device, weights.get(which, Weights.LAST).file), every
            )
            ap50[which], seen[which] = said.combined.summary()["ap50"], _found(validation, said.detections)
        missed = sorted(seen["before"] - seen["after"])
        rows += [
            [str(known.file), g, str(len(own)), *(ap(ap50[which][g]) for which in runs)] for g, own in groups.items()
        ]
        lines.append(
            f"{known.file}: {len(missed)} of {len(seen['before'])} objects found before are missed now: "
            f"{shorten([f'{name} in image {image}' for image, _, name in missed], 4) or 'none'}"
        )
        tree += [{"data": str(known.file), "groups": groups, "ap50": ap50, "missed": missed}]
    write_text(runs["after"].path / "retention.json", json.dumps(tree, indent=1))
    head, nothing = ["AP50 in percent on", "classes", "", *runs], "no validation images: no AP before and after"
    return "\n".join([*table_lines(head, rows, {*head[2:]}), *lines]) if lines else nothing


def _found(validation: Validation, detections: list[Detections]) -> set[tuple[int, int, str]]:
    """Image, annotation and class of the objects that were found, with a score that is shown. Of an image, objects are
    in the split's order, and after them crowds that hold all of it.
    """
    split, protocol, objects = validation.split, validation.protocol, validation.truth.objects
    sure = [Detections(d.boxes[k], d.scores[k], d.labels[k]) for d in detections for k in [d.scores >= SHOWN_SCORE]]
    found, order = found_of(results(split, sure), split.coco_ids), np.argsort(objects.image_ids, kind="stable")
    matching = match(found, objects, find_overlaps(found, objects), max(protocol.max_detections))
    first = np.searchsorted(objects.image_ids, [image.id for image in split.images], sorter=order)
    return {
        (image.id, number, protocol.names[label])
        for at, image in zip(first.tolist(), split.images, strict=True)
        for k, (number, label) in enumerate(zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True))
        if matching.finder[order[at + k]] >= 0
    }
