"""The audit's checks of proposals and pseudo boxes: what made them, whether they are copies of the ground truth.

Pseudo boxes on novel objects are what the method wants; how many there are is a diagnosis, and never a leak.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hdovd.cache.identity import differences
from hdovd.cache.schema import Level
from hdovd.data.coco import Skips, Split
from hdovd.evaluation.recall import box_ious
from hdovd.pipelines.audit.inputs import Audited
from hdovd.pipelines.audit.report import Check, Findings, Verdict
from hdovd.pipelines.audit.run import judge_record
from hdovd.pipelines.extraction.identities import box_table
from hdovd.pipelines.nouns.allowed import meaning
from hdovd.pipelines.proposal_files.table import ProposalTable


def class_of_noun(
    nouns: Sequence[str], classes: Sequence[str], synonyms: Mapping[str, Sequence[str]]
) -> dict[int, str]:
    """The class that a noun names, by the noun's row: its name or a synonym, in whatever form (`nouns.meaning`)."""
    meant = {meaning(own): name for name in reversed(classes) for own in (*synonyms.get(name, ()), name)}
    return {row: meant[form] for row, noun in enumerate(nouns) if (form := meaning(noun)) in meant}


def report_names(audited: Audited) -> Check:
    """A disclosure: captions may name novel classes, and results must say that they did."""
    boxes, novel, name = audited.boxes, audited.protocol.novel, "novel names"
    if boxes.noun is None:
        return Check(name, Verdict.REPORT, "the cache has no nouns: no pseudo box is named")
    if not boxes.nouns:
        return Check(
            name,
            Verdict.UNKNOWN,
            "pseudo boxes have texts that others published without the words: which they are is not known",
        )
    meant = class_of_noun(boxes.nouns, novel, audited.synonyms)
    wins = np.bincount(boxes.noun[boxes.noun >= 0], minlength=len(boxes.nouns))
    of_novel = {row: int(wins[row]) for row in meant}
    named = int((boxes.noun >= 0).sum())
    text = (
        f"{len(set(meant.values()))} of the {len(novel)} novel classes are named by {len(meant)} of {len(boxes.nouns)} "
        f"nouns, which "
        f"won {sum(of_novel.values()):,d} of {named:,d} pseudo labels (allowed, since captions name them; say so with "
        f"results)"
    )
    if not meant:
        text = (
            f"none of the {len(boxes.nouns)} nouns names one of the {len(novel)} novel classes, in singular or plural"
        )
    ordered = sorted(meant, key=lambda row: -of_novel[row])
    details = tuple(
        f"{boxes.nouns[row]}: {of_novel[row]:,d}" + (f" (for {meant[row]})" if meant[row] != boxes.nouns[row] else "")
        for row in ordered
    )
    return Check(
        name,
        Verdict.REPORT,
        text,
        details,
        {
            "nouns": len(boxes.nouns),
            "pseudo_labels": named,
            "won": {boxes.nouns[row]: {"class": meant[row], "pseudo_labels": of_novel[row]} for row in ordered},
        },
    )


COPY_PX = 0.02  # decimals of a file that was written and read
LEAST_COPIES, TIMES_CHANCE = 3, 5
IOU = 0.5


def check_made_by(audited: Audited, made_by: dict[str, Any] | None, whose: str) -> Check:
    """The proposals' network was trained on base boxes alone, as its record says. `whose`: the record, in words."""
    found = Findings("proposals: made by")
    if not audited.boxes.is_base.all() and not made_by:
        return found.cannot(f"{whose} does not say what made the proposals: whether that saw novel boxes is not known")
    if not made_by:
        return found.check("the cache has no proposals")
    fine = judge_record(audited, made_by, whose, found)
    return found.check(fine, {"made_by": made_by})


def check_same_proposals(audited: Audited, table: ProposalTable, split: Split, whose: str) -> Check:
    """The proposal file that was given is what the cache holds."""
    found = Findings("proposals: the file")
    expected = box_table(split.images, table.for_images(split.images, Skips())).inputs()["proposals"]
    lines = differences(
        {"proposals": expected},
        {"proposals": audited.cache.key_inputs(Level.BOXES).get("proposals")},
        sides=("the file gives", "the cache has"),
    )
    if lines:
        found.unknown.append(f"the cache was made from other proposals than {whose}: " + "; ".join(lines))
    return found.check(f"the cache holds the proposals of {whose}")


def check_copies(audited: Audited) -> Check:
    """No more proposals than by chance are ground truth boxes of novel classes, to the digit.

    Chance is measured: how often proposals are such boxes with one side moved by a pixel. Sides at the image's edge say
    nothing, so three others are needed.
    """
    boxes, truth, found = audited.boxes, audited.truth, Findings("proposals: copies")
    novel = truth.of_classes(audited.protocol.novel)
    shifts = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)]).astype(np.float32)
    hits, classes, where = np.zeros(len(shifts), np.int64), Counter[str](), []
    sizes = dict(zip(truth.image_id.tolist(), truth.size, strict=True))
    for image_id, rows, targets in _together(audited, novel):
        width, height = sizes[image_id]
        theirs = truth.box[targets]
        inside = ((theirs > 0.5) & (theirs < np.array([width, height, width, height]) - 0.5)).sum(1) >= 3
        away = boxes.box[rows][:, None] - theirs[inside][None]
        for at, shift in enumerate(shifts):
            same = (np.abs(away - shift) <= COPY_PX).all(-1)
            hits[at] += same.any(1).sum()
            if at == 0 and same.any():
                own = targets[inside][same.any(0)]
                classes.update(truth.class_name(i) for i in own.tolist())
                where += [
                    f"image {image_id}, annotation {truth.id[i]}, a {truth.class_name(i)!r}" for i in own.tolist()
                ]
    copies, chance, proposals = int(hits[0]), int(hits[1:].max()), int((~boxes.is_base).sum())
    text = f"{copies:,d} of {proposals:,d} proposals are novel ground truth boxes to {COPY_PX} px (jittered copies are not looked for)"  # noqa: E501
    if copies >= LEAST_COPIES and copies > TIMES_CHANCE * chance:
        found.leaks.append(f"{text}; by chance it would be about {chance}: they were made from the annotations")
        found.notes += where
    return found.check(
        text + (f", by chance it would be about {chance}" if copies else ""),
        {"copies": copies, "chance": chance, "proposals": proposals, "by_class": dict(classes)},
    )


def _together(audited: Audited, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every image that has both: its id, its proposals (rows of the cache) and its annotations among `wanted`."""
    boxes, truth = audited.boxes, audited.truth
    rows, targets = np.flatnonzero(~boxes.is_base), np.flatnonzero(wanted)
    rows = rows[np.argsort(boxes.of_image[rows], kind="stable")]
    targets = targets[np.argsort(truth.of_image[targets], kind="stable")]
    images = boxes.of_image[rows], truth.of_image[targets]
    both = np.intersect1d(*images)
    starts = [np.searchsorted(own, both, "left") for own in images]
    stops = [np.searchsorted(own, both, "right") for own in images]
    for at, image_id in enumerate(both.tolist()):
        yield image_id, rows[starts[0][at] : stops[0][at]], targets[starts[1][at] : stops[1][at]]


def report_pseudo_boxes(audited: Audited) -> Check:
    """A diagnosis: how many pseudo boxes lie on novel objects, and how many of those have the right noun."""
    boxes, truth, protocol = audited.boxes, audited.truth, audited.protocol
    novel = truth.of_classes(protocol.novel) & ~truth.crowd
    meant = class_of_noun(boxes.nouns, protocol.novel, audited.synonyms)
    on_novel, right, covered = Counter[str](), Counter[str](), Counter[str]()
    for _, rows, targets in _together(audited, novel):
        overlap = box_ious(boxes.box[rows], truth.box[targets])
        covered.update(truth.class_name(i) for i in targets[(overlap >= IOU).any(0)].tolist())
        best = overlap.argmax(1)
        for k in np.flatnonzero(overlap[np.arange(len(rows)), best] >= IOU).tolist():
            name = truth.class_name(targets[best[k]])
            on_novel[name] += 1
            right[name] += boxes.noun is not None and meant.get(int(boxes.noun[rows[k]])) == name
    in_cache = np.isin(truth.of_image, boxes.image_id)
    objects = Counter(truth.class_name(i) for i in np.flatnonzero(novel & in_cache).tolist())
    proposals = int((~boxes.is_base).sum())
    named = f", {right.total():,d} of them with the right noun" if boxes.nouns else "; their nouns are not known"
    text = (
        f"{on_novel.total():,d} of {proposals:,d} pseudo boxes lie on a novel object (IoU >= {IOU}){named}; "
        f"{covered.total():,d} of "
        f"{objects.total():,d} novel objects have one (diagnosis only: it must not choose settings)"
    )
    details = tuple(
        f"{name}: {on_novel[name]:,d} boxes"
        + (f", {right[name]:,d} rightly named" if boxes.nouns else "")
        + f"; {covered[name]:,d} of {objects[name]:,d} objects"
        for name in protocol.novel
        if objects[name]
    )
    numbers = {
        name: {"boxes": on_novel[name], "right": right[name], "covered": covered[name], "objects": objects[name]}
        for name in protocol.novel
    }
    return Check("pseudo boxes", Verdict.REPORT, text, details, {"pseudo_boxes": proposals, "by_class": numbers})
