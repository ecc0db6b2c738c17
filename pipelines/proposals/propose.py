"""Proposals: train a class-agnostic network on base boxes alone, or take a trained one, choose what is kept of what it
finds, then propose boxes on training images.

Under torchrun every one of its processes runs `propose`. Proposals are made in parts of a thousand images, each written
as it is done to a folder NAME.parts beside NAME.json: a killed pass goes on, and processes share it.

What is kept: the largest overlap with a base box, the shortest side, the lowest score
and the number an image, those that are not given chosen by base boxes alone.

A rehearsal tells what becomes of objects that nobody labelled: a network that is trained as the one that proposes, but
without the boxes of every other base class, which are then to it what novel classes are. A choice is measured by how
many of their boxes its proposals find: R, the recall. B proposals an image are what the same choice keeps of the
network that proposes, with all base boxes known. Of these, at most as many lie on objects as there are
unlabelled objects, n, and the others lie on none. n is not known, but n <= B / R if unlabelled objects are found as
often as held-out ones: the least B / R of all choices stands for it. The choice made is that of the highest F2 of
finding unlabelled objects, 5 n R / (B + 4 n), in which recall counts twice: training weighs a box by how likely its
label is, so that one on nothing costs less than an object that is taught to be background.

Without a rehearsal, as with a checkpoint that has none beside it, classes are held out in turn that the network has
learnt from. It scores their boxes higher than those of other objects, the more so the longer it was trained: n comes
out too low, and proposals too few.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product, repeat
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from hdovd.cache import hash_tables, key_of
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, counted, log, quiet, shorten
from hdovd.data import ImageBoxes, Split, load_protocol
from hdovd.modeling.proposals.networks import ProposalNetwork
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.device import Team, placed, team
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.nouns.allowed import meaning
from hdovd.pipelines.proposal_files.file import NO_PROPOSALS, Proposals, ProposalTable, read_npz, write_proposals
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.networks import (
    Find,
    Pictures,
    found_in,
    load_network,
    made_by,
    require_some_readable,
    stop_if_asked,
    trained_network,
    with_rows,
)

OVERLAPS = (0.05, 0.1, 0.2, 0.3, 0.5)
SCORES = tuple(round(0.05 * k, 2) for k in reversed(range(19)))  # of equal choices the strictest
TOPS = (1, 2, 3, 5, 10, 20)
SIDE_QUANTILES = (0.0, 0.02)  # of the shorter sides of base boxes
LEAST_SIDE = 8.0  # pixels
FOLDS = 4  # of the base classes, without a rehearsal
FOUND_IOU = 0.5
RECALL_COUNTS = 2.0  # times as much as precision
LEAST_RECALL = 0.3  # of a choice that says how many objects there are: fewer are too few to tell
TO_CHOOSE_BY = 400  # images, evenly spaced


class Example(NamedTuple):
    """A picture to choose by: boxes (n, 4) and scores (n,) of the network, base boxes (b, 4) and their labels (b,);
    `rehearsed`: boxes and scores of the rehearsal, if there is one, and which base boxes (b,) bool it never saw.
    """

    boxes: Tensor
    scores: Tensor
    base: Tensor
    labels: Tensor
    rehearsed: tuple[Tensor, Tensor, Tensor] | None = None

    def trials(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (n, 4) and scores (n,), and which base boxes (b,) bool count as unlabelled."""
        if self.rehearsed is not None:
            return [self.rehearsed]
        return [(self.boxes, self.scores, self.labels % FOLDS == fold) for fold in (self.labels % FOLDS).unique()]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is kept of what a network finds."""

    top: int
    overlap: float
    min_side: float
    min_score: float

    def keep(self, boxes: Tensor, scores: Tensor, base: Tensor) -> Tensor:
        """Rows to keep of an image's boxes, best first: those that overlap a base box go, then NMS.

        Args:
            boxes: (n, 4), scores: (n,), base: (b, 4); xyxy pixels of the original image.
        """
        rows = (self.usable(boxes, base) & (scores >= self.min_score)).nonzero().flatten()
        return rows[nms(boxes[rows], scores[rows], self.overlap)][: self.top]

    def kept(self, image: ImageBoxes, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """The boxes of an image that are kept, their scores, and nothing to tell of them."""
        rows = self.keep(boxes, scores, torch.from_numpy(image.boxes))
        return boxes[rows], scores[rows], []

    def usable(self, boxes: Tensor, base: Tensor) -> Tensor:
        """(n,) bool: which are large enough, and beside the base boxes."""
        is_large = boxes[:, 2:] - boxes[:, :2] >= self.min_side
        return torch.cat([is_large, box_iou(boxes, base) <= self.overlap], dim=1).all(dim=1)


USUAL = Selection(10, 0.5, LEAST_SIDE, 0.0)  # where base boxes say nothing


@dataclass(frozen=True, slots=True)
class Choice:
    """A selection and what base boxes say of it: recall R of held-out boxes, proposals an image B, and of these the
    share that lies on an object, at most n R / B.
    """

    selection: Selection
    recall: float
    per_image: float
    on_object: float

    def about(self) -> dict[str, float | int]:
        """JSON values."""
        numbers = {name: round(getattr(self, name), 4) for name in ("recall", "per_image", "on_object")}
        return asdict(self.selection) | {"by_base_boxes": numbers}

    @property
    def line(self) -> str:
        """In words."""
        one = self.selection
        return (
            f"chosen by base boxes alone: --overlap {one.overlap:g} --min-score {one.min_score:g} --min-side "
            f"{one.min_side:g} --top {one.top}. With base classes held out it finds {self.recall:.0%} of their "
            f"boxes at IoU {FOUND_IOU}; {self.per_image:.2f} proposals an image, of which about {self.on_object:.0%} "
            f"lie on an object and {1 - self.on_object:.0%} on none"
        )


def choose(examples: Iterable[Example], job: ProposeConfig) -> Choice | None:
    """The best choice of what the job leaves open; what it gives stays. None if no held-out box is found."""
    seen = list(examples)
    sides = torch.cat([torch.zeros(0), *((e.base[:, 2:] - e.base[:, :2]).amin(dim=1) for e in seen)])
    quantiles = (
        torch.quantile(sides, torch.tensor(SIDE_QUANTILES)).floor().clamp(min=LEAST_SIDE).tolist()
        if len(sides)
        else [LEAST_SIDE]
    )
    overlaps = OVERLAPS if job.overlap is None else (job.overlap,)
    min_sides = tuple(dict.fromkeys(quantiles)) if job.min_side is None else (job.min_side,)
    scores = SCORES if job.min_score is None else (job.min_score,)
    tops = TOPS if job.top is None else (job.top,)
    kept = np.zeros((len(overlaps), len(min_sides), len(scores), len(tops)))
    found = np.zeros_like(kept)
    for at, (overlap, min_side) in enumerate(product(overlaps, min_sides)):
        most = Selection(max(tops), overlap, min_side, min(scores))
        where = np.unravel_index(at, kept.shape[:2])
        for example in seen:
            kept[where] += _counts(example.scores[most.keep(*example[:3])].numpy(), scores, tops)
            for boxes, ranks, out in example.trials():
                rows = most.keep(boxes, ranks, example.base[~out])
                if not len(rows) or not out.any():
                    continue
                hit = box_iou(boxes[rows], example.base[out]) >= FOUND_IOU
                # A box is found by the first proposal that lies on it: by a choice that keeps this one.
                firsts = hit.int().argmax(dim=0)[hit.any(dim=0)].numpy()
                found[where] += _counts(ranks[rows].numpy(), scores, tops, firsts)
    if not found.any():
        return None
    recall = found / sum(int(out.sum()) for example in seen for *_, out in example.trials())
    per_image = kept / len(seen)
    objects = np.maximum(kept, 1) / len(seen) / np.maximum(recall, 1e-9)  # what keeps nothing says little of n
    count = objects[recall >= min(LEAST_RECALL, recall.max())].min()
    beta = RECALL_COUNTS**2
    score = (1 + beta) * count * recall / np.maximum(per_image + beta * count, 1e-9)
    best = np.unravel_index(score.argmax(), kept.shape)
    of_overlap, of_side, of_score, of_top = map(int, best)
    return Choice(
        Selection(tops[of_top], overlaps[of_overlap], min_sides[of_side], scores[of_score]),
        float(recall[best]),
        float(per_image[best]),
        float(min(1.0, count * recall[best] / max(per_image[best], 1e-9))),
    )


def _counts(
    ranked: np.ndarray, scores: tuple[float, ...], tops: tuple[int, ...], places: np.ndarray | None = None
) -> np.ndarray:
    """How many of the places, by default all, are among those that each lowest score and number keeps: (scores, tops).

    ranked: scores of an image's proposals, best first.
    """
    places = np.arange(len(ranked)) if places is None else places
    high = ranked[places][:, None, None] >= np.array(scores)[:, None]
    return np.asarray((high & (places[:, None, None] < np.array(tops))).sum(axis=0))


# An image, the boxes that were found in it and their scores -> those to keep, best first, and JSON values of each.
Kept = Callable[[ImageBoxes, Tensor, Tensor], tuple[Tensor, Tensor, list[Any]]]
IMAGES = 1024  # of a part, about; half a minute on a GPU


class Parts:
    """What is found in the images of a split, in parts, each a proposal file of its own. A part is whole batches, so
    that a batch is the same whatever is there already and however many processes share it.
    """

    def __init__(self, folder: Path, split: Split, batch_size: int, origin: dict[str, Any]) -> None:
        """`origin`: what made the network, and what is kept of what it finds, as JSON has it: parts of another one, or
        of other base boxes, are others.
        """
        self.folder, self.images = folder, len(split.images)
        boxes = hash_tables([np.array([image.id for image in split.images]), *(image.boxes for image in split.images)])
        self.key = key_of({"made_by": origin, "boxes": boxes, "batch": batch_size})
        self.size = batch_size * max(1, IMAGES // batch_size)
        self.numbers = range(-(-self.images // self.size))

    def rows(self, part: int) -> range:
        """The images of a part, by number."""
        return range(self.images)[part * self.size : (part + 1) * self.size]

    def file(self, part: int) -> Path:
        return self.folder / f"{part:05d}-of-{self.size}-{self.key}.npz"

    def is_done(self, part: int) -> bool:
        """A damaged one is made again."""
        try:
            return self.file(part).is_file() and bool(self.read(part))
        except HdovdError:
            return False

    def write(self, part: int, found: dict[int, Proposals], **told: list[Any]) -> None:
        """What was found in the pictures of a part, by image id, and what is told of it: JSON values by name, such as
        `unreadable`, why pictures could not be read. Raises HdovdError if there is no room.
        """
        write_proposals(self.file(part), found, {"images": list(found), **told})

    def read(self, part: int) -> tuple[dict[int, Proposals], dict[str, list[Any]]]:
        """What was written."""
        table, about = read_npz(self.file(part))
        found, told = table.by_image(), about["made_by"]
        return {image_id: found.get(image_id, NO_PROPOSALS) for image_id in told["images"]}, told


def propose(job: ProposeConfig) -> dict[int, Proposals]:
    """Train or load the network, propose, write `job.out` and return the proposals by image id.

    Raises HdovdError for bad input, and Stopped if a signal ended it: the same call goes on.
    """
    replace(job, report=False).check()
    with team(job.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        return _propose(job, us, stop)


def _propose(job: ProposeConfig, us: Team, stop: StopSignal) -> dict[int, Proposals]:
    split = job.data.load("train2017", load_protocol(job.protocol), base_only=True, exif=job.recipe.input.exif)
    require_some_readable(split, job.recipe)
    network, origin = _network(job, split, us, stop)
    as_trained = replace(job, recipe=job.recipe.with_precision(origin["recipe"]["train"]["precision"]))
    selection, about = _selection(as_trained, split, network, us, stop)
    origin["selection"] = asdict(selection)  # with it, everything that made the proposals
    parts = Parts(job.beside("parts"), split, job.recipe.train.batch_size, origin)
    find_parts(parts, Pictures(split, job.recipe), network.propose, network.recipe, us, stop, selection.kept)
    origin["selection"] = about
    done = [parts.read(part) for part in parts.numbers]
    us.wait()
    found = {image_id: proposals for part, _ in done for image_id, proposals in part.items()}
    log(*(f"skipped: {problem}" for _, told in done for problem in told["unreadable"]))
    if us.leads:
        _write(job, found, origin)
        shutil.rmtree(parts.folder, ignore_errors=True)
    return found


def _network(job: ProposeConfig, split: Split, us: Team, stop: StopSignal) -> tuple[ProposalNetwork, dict[str, Any]]:
    """The network to propose with, and what made it; its backbone is kept where that is wanted."""
    if job.out is not None and job.out.is_file():
        log(f"note: {job.out} is there, and will be replaced; to keep it, stop here and give another --out")
    if job.checkpoint:
        network, origin = checkpointed(job.checkpoint[0], job, us)
    else:
        network, origin = trained_network(job, job.trained[0], split, us, stop)
    if us.leads and job.backbone_out is not None:
        body = {k: v.cpu().contiguous() for k, v in network.backbone.body.state_dict().items()}
        about = {"made_by": json.dumps(origin)}  # for the audit of detectors that start from it
        replace_file(job.backbone_out, lambda partial: save_file(body, partial, about))
        log(f"wrote {job.backbone_out}: the backbone, for --set detector.backbone.weights=")
    return network, origin


def checkpointed(file: Path, job: ProposeConfig, us: Team) -> tuple[ProposalNetwork, dict[str, Any]]:
    """The network of --checkpoint, on the team's device, and what made it. Raises HdovdError if it saw boxes of novel
    classes.
    """
    (network, origin), protocol = load_network(file, job.recipe), load_protocol(job.protocol)
    known = sorted(set(origin["protocol"]["base"]).difference(protocol.base))
    if novel := [name for name in known if meaning(name) in map(meaning, protocol.novel)]:
        raise HdovdError(
            f"{file} was trained on boxes of {shorten(novel)}, which {job.protocol} calls novel: its proposals would "
            f"give them away. Train a network with this protocol"
        )
    if known:
        log(f"{file} was trained on boxes of {shorten(known)}, which {job.protocol} does not name")
    return placed(network, us.device).eval(), origin


def _selection(
    job: ProposeConfig, split: Split, network: ProposalNetwork, us: Team, stop: StopSignal
) -> tuple[Selection, dict[str, Any]]:
    """What is kept of what the network finds, and what to record of it; chosen by one process, for all of them."""
    given = job.selection()
    if len(given) == len(fields(Selection)):
        return Selection(**given), given  # type: ignore[arg-type]
    rehearsal, out = _rehearsal(job, split, us, stop)
    about: dict[str, Any] = (
        {} if rehearsal is None else {"held_out": [load_protocol(job.protocol).base[k] for k in out]}
    )
    chosen = us.gather(_choice(job, split, network, rehearsal, out, us) if us.leads else None)[0]
    if chosen is None:
        log("note: the network finds no box of a held-out base class, by which to choose what to keep")
        selection = replace(USUAL, **given)  # type: ignore[arg-type]
        return selection, asdict(selection) | {"by_base_boxes": about}
    log(chosen.line)
    told = chosen.about()
    return chosen.selection, told | {"by_base_boxes": told["by_base_boxes"] | about}


def _choice(
    job: ProposeConfig,
    split: Split,
    network: ProposalNetwork,
    rehearsal: ProposalNetwork | None,
    out: list[int],
    us: Team,
) -> Choice | None:
    """By what the network finds in some images, and the rehearsal, which has not learnt from the labels `out`."""
    count, pictures = min(TO_CHOOSE_BY, len(split.images)), Pictures(split, job.recipe)
    numbers = [number * len(split.images) // count for number in range(count)]
    found = found_in(pictures, numbers, network.propose, network.recipe, us, "choose by base boxes")
    again: Iterable[Any] = (
        repeat(None)
        if rehearsal is None
        else found_in(pictures, numbers, rehearsal.propose, rehearsal.recipe, us, "rehearsal")
    )
    examples = []
    for number, (picture, boxes, scores), other in zip(numbers, found, again, strict=False):
        if not picture.problem:
            image = split.images[number]
            base, labels = torch.from_numpy(image.boxes), torch.from_numpy(image.labels)
            rehearsed = None if other is None else (*other[1:], torch.isin(labels, torch.tensor(out)))
            examples.append(Example(boxes, scores, base, labels, rehearsed))
    chosen = choose(examples, job)
    if chosen is None and rehearsal is not None:
        log("the rehearsal finds no box of a held-out class: chosen by classes that the network has learnt")
        chosen = choose([one._replace(rehearsed=None) for one in examples], job)
    return chosen


def _rehearsal(
    job: ProposeConfig, split: Split, us: Team, stop: StopSignal
) -> tuple[ProposalNetwork | None, list[int]]:
    """The network that has not learnt from the held-out classes: from its file, or trained and put there; and the
    labels of these classes. None if it is not wanted, with a checkpoint that has none beside it, and where there are
    boxes of one base class alone.
    """
    protocol = load_protocol(job.protocol)
    out = np.unique(np.concatenate([image.labels for image in split.images])).tolist()[1::2]
    taught = [name for label, name in enumerate(protocol.base) if label not in out]
    if job.no_rehearsal or not out:
        return None, out
    if job.checkpoint:
        network = job.checkpoint[0]
        name, _, kind = network.name.removesuffix(".safetensors").rpartition(".")
        file = network.with_name(f"{name}.rehearsal.{kind}.safetensors".lstrip("."))
        origins = [made_by(one) for one in (network, file) if one.is_file()]
        known = [(one["detector"], one["recipe"], one["annotations"]["sha256"]) for one in origins]
        if len(known) < 2 or known[0] != known[1] or origins[1]["protocol"]["base"] != taught:
            log(f"what to keep is chosen by classes that the network has learnt: no {file.name} of its lies beside it")
            return None, out
        return placed(load_network(file, job.recipe)[0], us.device).eval(), out
    seen = with_rows(split, (~np.isin(image.labels, out) for image in split.images))
    if not protocol.keep_empty_train:
        seen = replace(seen, images=[image for image in seen.images if len(image.boxes)])
    log(
        f"rehearsal, to choose what to keep: the same network without the boxes of "
        f"{counted(len(out), 'base class', 'base classes')}"
    )
    own = replace(job, out=job.beside("rehearsal.json"))
    return trained_network(own, job.trained[0], seen, us, stop, taught)[0], out


def find_parts(
    parts: Parts,
    pictures: Pictures,
    find: Find,
    trained_by: Recipe,
    us: Team,
    stop: StopSignal,
    kept: Kept,
    what: str = "propose",
) -> None:
    """Write the parts that are not there, of which each process has its own. `kept`: what to keep of what was found;
    `find`, `trained_by`, `what`: as of `found_in`. Raises Stopped if a signal came.
    """
    mine = [part for part in parts.numbers if not parts.is_done(part)][us.rank :: us.world]
    us.wait()  # all have looked, before the first one writes
    numbers = [number for part in mine for number in parts.rows(part)]
    results = found_in(pictures, numbers, find, trained_by, us, what)
    for part in mine:
        found, unreadable, names = dict[int, Proposals](), list[str](), list[Any]()
        for number, (picture, boxes, scores) in zip(parts.rows(part), results, strict=False):
            stop_if_asked(stop, f"proposing; whole parts are in {parts.folder}")
            if picture.problem:
                unreadable.append(picture.problem)
                continue
            image = pictures.split.images[number]
            boxes, scores, called = kept(image, clip_boxes_to_image(boxes, (image.height, image.width)), scores)
            found[picture.image_id] = Proposals(boxes.numpy(), scores.numpy())
            names.append(called)
        parts.write(part, found, unreadable=unreadable, names=names)
    us.wait()


def _write(job: ProposeConfig, found: dict[int, Proposals], origin: dict[str, Any]) -> None:
    assert job.out is not None  # as checked
    count = write_proposals(job.out, found, origin)
    log(
        f"wrote {job.out}: {count} proposals for {len(found)} images, {count / len(found):.1f} an image, identity "
        + ProposalTable.of(found).identity()
    )
    if not count:
        log(f"note: no proposal is left of what the network found ({origin['selection']}): lower --min-score")
    log(f"next: hdovd extract-clip --proposals {quote(str(job.out))} ...")
