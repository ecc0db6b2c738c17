"""Proposals: train a class-agnostic network on base boxes alone, or take a trained one, then propose boxes on training
images.

Under torchrun every one of its processes runs `propose`. Proposals are made in parts of a thousand images, each written
as it is done to a folder NAME.parts beside NAME.json: a killed pass goes on, and processes share it.

With `report`: how many objects networks find, side by side; average recall of base and of novel objects, counted over
what a network proposes, before proposals that overlap base boxes are taken out. Novel objects are counted as a
diagnosis alone: no stage chooses anything by them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from hdovd.cache.identity import key_of
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError, Stopped, counted, shorten
from hdovd.core.log import log, quiet
from hdovd.data.coco import ImageBoxes, Split, read_instances
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.evaluation.matching import THRESHOLDS, found_at, recall
from hdovd.modeling.proposals.networks import ProposalNetwork
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.device import Team, placed, team
from hdovd.pipelines.common.process import StopSignal, exit_code
from hdovd.pipelines.nouns.allowed import meaning
from hdovd.pipelines.proposal_files.file import (
    NO_PROPOSALS,
    Proposals,
    ProposalTable,
    made_by_line,
    read_table,
    write_proposals,
)
from hdovd.pipelines.proposal_files.table import read_npz
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.networks import (
    Finder,
    Pictures,
    found_in,
    load_network,
    made_by,
    require_some_readable,
    settings,
    settled_job,
    trained_network,
)
from hdovd.pipelines.proposals.selection import TO_CHOOSE_BY, USUAL, Example, Selection, choose
from hdovd.pipelines.runs.listing import ap, table_lines

IMAGES = 1024  # of a part, about; half a minute on a GPU
MOST = (5, 10, 30, 100)  # proposals an image
GROUPS = ("base", "novel")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of `images` images, each a proposal file of its own. `key`: of everything that determines them; those
    with another key are made again.

    `size`: images of a part, whole batches, so that a batch is the same whatever is there already and however many
    processes share it.
    """

    folder: Path
    images: int
    size: int
    key: str

    @classmethod
    def of(cls, folder: Path, split: Split, batch_size: int, origin: dict[str, Any]) -> "Parts":
        """`origin`: what made the network, and what is kept of what it finds; as JSON has it."""
        rows, images = hashlib.sha256(), len(split.images)
        for image in split.images:
            rows.update(f"{image.id} {len(image.boxes)} ".encode() + image.boxes.tobytes())
        size = batch_size * max(1, IMAGES // batch_size)
        return cls(folder, images, size, key_of({"made_by": origin, "boxes": rows.hexdigest(), "batch": batch_size}))

    def numbers(self) -> range:
        return range(-(-self.images // self.size))

    def rows(self, part: int) -> range:
        """The images of a part, by number."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

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
    network, origin = _network(job, split, us, stop)
    require_some_readable(split)
    as_trained = replace(job, recipe=job.recipe.with_precision(origin["recipe"]["train"]["precision"]))
    selection, about = _selection(as_trained, split, network, us, stop)
    origin["selection"] = asdict(selection)  # with it, everything that made the proposals
    parts = found_parts(job.beside("parts"), split, job.recipe, origin, network, selection, us, stop)
    origin["selection"] = about
    done = [parts.read(part) for part in parts.numbers()]
    us.wait()
    found = {image_id: proposals for part, _ in done for image_id, proposals in part.items()}
    log(*(f"skipped: {problem}" for _, told in done for problem in told["unreadable"]))
    if us.leads:
        _write(job, found, origin)
        shutil.rmtree(parts.folder, ignore_errors=True)
    return found


def _network(job: ProposeConfig, split: Split, us: Team, stop: StopSignal) -> tuple[ProposalNetwork, dict[str, Any]]:
    """The network to propose with, and what made it; its backbone is kept where that is wanted."""
    if us.leads and (note := replaced_line(job, split, us)):
        log(note)
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


def replaced_line(job: ProposeConfig, split: Split, us: Team) -> str | None:
    """What to say of a file whose place new proposals will take; None without one, or if it was made as they will
    be.
    """
    if job.out is None or not job.out.is_file():
        return None
    try:
        before = read_table(job.out)
    except HdovdError:
        return f"note: {job.out} is there, but is no proposal file that can be read; these proposals will replace it"
    if job.checkpoint:
        planned = made_by(job.checkpoint[0])
    else:
        planned = settings(settled_job(job, job.trained[0], us)[0], job.trained[0], split)
    known = before.made_by or {}
    kept, given = known.get("selection"), job.selection()
    same = (
        isinstance(kept, dict)
        and all(kept.get(name) == value for name, value in given.items())
        and ("by_base_boxes" in kept) == (len(given) < len(fields(Selection)))
        and (
            "by_base_boxes" not in kept
            or bool(job.checkpoint)
            or ("held_out" in kept["by_base_boxes"]) != job.no_rehearsal
        )
    )
    if same and all(known.get(name) == value for name, value in planned.items()):
        return None
    return (
        f"note: {job.out} is there with {len(before.image_id):,d} proposals made otherwise "
        f"({made_by_line(before.made_by)}); these will replace them. To keep them, stop here and give another --out"
    )


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
    chosen = None
    if us.leads:
        count = min(TO_CHOOSE_BY, len(split.images))
        numbers = [number * len(split.images) // count for number in range(count)]
        pictures = Pictures(split, job.recipe)
        own = [(torch.from_numpy(split.images[n].boxes), torch.from_numpy(split.images[n].labels)) for n in numbers]
        results = found_in(pictures, numbers, network, us, "choose by base boxes")
        every = [Example(*found[1:], *base) for found, base in zip(results, own, strict=True) if not found[0].problem]
        if rehearsal is not None:
            found = [one for one in found_in(pictures, numbers, rehearsal, us, "rehearsal") if not one[0].problem]
            rehearsed = [
                example._replace(rehearsed=(*one[1:], torch.isin(example.labels, torch.tensor(out))))
                for example, one in zip(every, found, strict=True)
            ]
            chosen = choose(rehearsed, job)
            if chosen is None:
                log("the rehearsal finds no box of a held-out class: chosen by classes that the network has learnt")
        chosen = chosen or choose(every, job)
    best = us.gather(chosen)[0]
    if best is None:
        log("note: the network finds no box of a held-out base class, by which to choose what to keep")
        selection = replace(USUAL, **given)  # type: ignore[arg-type]
        return selection, asdict(selection) | {"by_base_boxes": about}
    log(best.line)
    told = best.about()
    return best.selection, told | {"by_base_boxes": told["by_base_boxes"] | about}


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
        if len(known) < 2 or known[0] != known[1] or made_by(file)["protocol"]["base"] != taught:
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


def found_parts(
    folder: Path,
    split: Split,
    recipe: Recipe,
    origin: dict[str, Any],
    network: Finder,
    selection: Selection,
    us: Team,
    stop: StopSignal,
    kept: Callable[[ImageBoxes, Tensor, Tensor], tuple[Tensor, Tensor, list[Any]]] | None = None,
) -> Parts:
    """What a network finds in the images of a split, in parts, of which each process writes its own that are not there.

    Args:
        recipe: of which batch size and workers are taken. origin: all that made the parts, as JSON has it.
        kept: of a detector, whose scores are (n, 1 + N), instead of `selection`: the boxes to keep of an image, their
            scores, highest first, and what to tell of each, JSON values.

    Raises Stopped if a signal came.
    """
    parts = Parts.of(folder, split, recipe.train.batch_size, origin)
    mine = [part for part in parts.numbers() if not parts.is_done(part)][us.rank :: us.world]
    us.wait()  # all have looked, before the first one writes
    numbers = [number for part in mine for number in parts.rows(part)]
    results = found_in(Pictures(split, recipe), numbers, network, us, "propose" if kept is None else "relabel")
    for part in mine:
        found, unreadable, named = dict[int, Proposals](), list[str](), list[Any]()
        for number, (picture, boxes, scores) in zip(parts.rows(part), results, strict=False):
            stop_if_asked(stop, f"proposing; whole parts are in {parts.folder}")
            image = split.images[number]
            if picture.problem:
                unreadable.append(picture.problem)
                continue
            boxes = clip_boxes_to_image(boxes, (image.height, image.width))
            if kept is None:
                keep = selection.keep(boxes, scores, torch.from_numpy(image.boxes))
                boxes, scores, called = boxes[keep], scores[keep], list[Any]()
            else:
                boxes, scores, called = kept(image, boxes, scores)
            found[picture.image_id] = Proposals(boxes.numpy(), scores.numpy())
            named.append(called)
        parts.write(part, found, unreadable=unreadable, **({} if kept is None else {"names": named}))
    us.wait()
    return parts


def stop_if_asked(stop: StopSignal, doing: str) -> None:
    """Raises Stopped, saying what was being done, if a signal came."""
    if stop.received:
        raise Stopped(f"stopped while {doing}; the same command goes on there", exit_code(stop.received))


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


@dataclass(frozen=True, slots=True)
class Recall:
    """Average recall of one network in percent, by group ("base", "novel") and number of proposals an image; None
    without objects.

    `objects`: by group. `proposals_per_image`: in the mean, of all that the network has.
    """

    network: str
    images: int
    proposals_per_image: float
    objects: dict[str, int]
    ar50: dict[str, dict[int, float | None]]
    ar50_95: dict[str, dict[int, float | None]]
    novel: str = "a diagnosis: never used for choosing"


def recall_report(job: ProposeConfig) -> list[Recall]:
    """Train or load the networks, count what they find and say it; with `job.out` also in NAME.recall.json beside it.

    Raises HdovdError for bad input or a validation picture that cannot be read, and Stopped if a signal ended it.
    """
    replace(job, report=True).check()
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
            write_text(file, json.dumps([asdict(one) for one in found], indent=1))
            log(f"wrote {file}")
        log(recall_table(found))
        return found


def without_crowds(split: Split) -> Split:
    """A box around many objects is none that a proposal could find."""
    found = read_instances(split.annotations)
    crowds = found.ids[found.crowd]
    return with_rows(split, [~np.isin(image.annotation_ids, crowds) for image in split.images])


def with_rows(split: Split, keep: Iterable[np.ndarray]) -> Split:
    """The split with the boxes of each image that a row of bool (n,) keeps."""
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
    objects = {group: sum(one.shape[1] for one in every[group]) for group in GROUPS}
    at = {group: {most: recall(every[group], most) * 100 for most in MOST} for group in GROUPS}
    return Recall(
        name,
        len(split.images),
        sum(n for _, n in shares) / len(split.images),
        objects,
        {group: {k: float(v[0]) if objects[group] else None for k, v in rows.items()} for group, rows in at.items()},
        {
            group: {k: float(v.mean()) if objects[group] else None for k, v in rows.items()}
            for group, rows in at.items()
        },
    )


def recall_table(found: list[Recall]) -> str:
    """Networks side by side, base and novel, as text."""
    head = ("network", "objects", *(f"AR50@{most}" for most in MOST), *(f"AR@{most}" for most in MOST))
    rows = [
        (one.network, group, *map(ap, one.ar50[group].values()), *map(ap, one.ar50_95[group].values()))
        for one in found
        for group in GROUPS
    ]
    counts = " and ".join(f"{found[0].objects[group]} {group}" for group in GROUPS)
    lines = [
        f"Average recall in percent at IoU 0.5 (AR50) and {THRESHOLDS[0]}:{THRESHOLDS[-1]} (AR), {found[0].images} "
        f"pictures, {counts} objects.",
        "Novel is a diagnosis: choose nothing by it.",
        *table_lines(head, rows, set(head[2:])),
    ]
    return "\n".join(lines)
