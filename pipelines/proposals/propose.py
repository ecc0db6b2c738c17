"""Proposals: train a class-agnostic network on base boxes alone, or take a trained one, then propose boxes on training
images.

Under torchrun every one of its processes runs `propose`.

Proposals of a whole split in parts of a thousand images, each written as it is done: a killed pass goes on, and
processes share it.

Beside NAME.json a folder NAME.parts holds them until the file is written.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor
from torchvision.ops import box_iou, nms

from hdovd.core.errors import HdovdError, Stopped
from hdovd.core.log import log, quiet
from hdovd.data.coco import Split
from hdovd.data.protocol import load_protocol
from hdovd.modeling.proposals.base import ProposalNetwork
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.device import Team, placed, team
from hdovd.pipelines.common.process import StopSignal, exit_code
from hdovd.pipelines.proposal_files.file import Proposals, ProposalTable, made_by_line, read_table, write_proposals
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.proposals.networks import Pictures, found_in, load_network, require_some_readable, settings
from hdovd.pipelines.proposals.networks import made_by as made_by_of
from hdovd.pipelines.proposals.training import settled_job, trained_network

IMAGES = 1024  # of a part, about; half a minute on a GPU


@dataclass(slots=True)
class Part:
    """What was found in the pictures of a part, by image id; `unreadable`: why others could not be read."""

    found: dict[int, Proposals] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of `images` images. `key`: of everything that determines them; those with another key are made again.

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
        key = hashlib.sha256(
            json.dumps([origin, rows.hexdigest(), size, batch_size], sort_keys=True).encode()
        ).hexdigest()
        return cls(folder, images, size, key)

    def numbers(self) -> range:
        return range(-(-self.images // self.size))

    def rows(self, part: int) -> range:
        """The images of a part, by number."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def missing(self) -> list[int]:
        return [part for part in self.numbers() if not self._is_done(part)]

    def write(self, number: int, part: Part) -> None:
        """Raises HdovdError if there is no room."""
        found = part.found.values()
        arrays = {
            "image_id": np.array(list(part.found), np.int64),
            "count": np.array([len(p.scores) for p in found], np.int64),
            "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(p.boxes for p in found)]),
            "scores": np.concatenate([np.zeros(0, np.float32), *(p.scores for p in found)]),
        }
        metadata = {"key": self.key, "unreadable": json.dumps(part.unreadable)}
        replace_file(self._file(number), lambda partial: save_arrays(arrays, partial, metadata))

    def read(self, number: int) -> Part:
        arrays = load_file(self._file(number))
        ends = arrays["count"].cumsum().tolist()
        found = {
            image_id: Proposals(arrays["boxes"][end - n : end], arrays["scores"][end - n : end])
            for image_id, n, end in zip(arrays["image_id"].tolist(), arrays["count"].tolist(), ends, strict=True)
        }
        return Part(found, list(json.loads(self._metadata(number)["unreadable"])))

    def _is_done(self, number: int) -> bool:
        try:
            return self._file(number).is_file() and self._metadata(number).get("key") == self.key
        except (SafetensorError, OSError):
            return False

    def _metadata(self, number: int) -> dict[str, str]:
        with safe_open(self._file(number), "np") as tensors:
            return dict(tensors.metadata() or {})

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def fill(
    parts: Parts, mine: list[int], results: Iterable[tuple[int, Proposals | str]], check: Callable[[], None]
) -> None:
    """Write the parts `mine` from their images' results, in order: image id, and proposals or why there are none.
    `check` may raise.
    """
    stream: Iterator[tuple[int, Proposals | str]] = iter(results)
    for number in mine:
        part = Part()
        for _ in parts.rows(number):
            image_id, result = next(stream)
            check()
            if isinstance(result, str):
                part.unreadable.append(result)
            else:
                part.found[image_id] = result
        parts.write(number, part)


def propose(job: ProposeConfig) -> dict[int, Proposals]:
    """Train or load the network, propose, write `job.out` and return the proposals by image id.

    Raises HdovdError for bad input, and Stopped if a signal ended it: the same call goes on.
    """
    job.check()
    with team(job.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        return _propose(job, us, stop)


def _propose(job: ProposeConfig, us: Team, stop: StopSignal) -> dict[int, Proposals]:
    split = job.data.load("train2017", load_protocol(job.protocol), base_only=True, exif=job.recipe.input.exif)
    if us.leads and job.out.is_file():
        planned = made_by_of(job.checkpoint) if job.checkpoint else settings(settled_job(job.network, us)[0], split)
        if note := replaced_line(job.out, {**planned, "selection": job.selection()}):
            log(note)
    network, origin = (
        checkpointed(job.checkpoint, job, us) if job.checkpoint else trained_network(job.network, split, us, stop)
    )
    if us.leads and job.backbone_out is not None:
        body = {k: v.cpu().contiguous() for k, v in network.backbone.body.state_dict().items()}
        about = {"made_by": json.dumps(origin)}  # for the audit of detectors that start from it
        replace_file(job.backbone_out, lambda partial: save_file(body, partial, about))
        log(f"wrote {job.backbone_out}: the backbone, for --set detector.backbone.weights=")
    require_some_readable(split)
    made_by = {**origin, "selection": job.selection()}  # everything that made the proposals
    parts = Parts.of(job.out.with_name(f"{job.out.stem}.parts"), split, job.recipe.train.batch_size, made_by)
    mine = parts.missing()[us.rank :: us.world]
    us.wait()  # all have looked, before the first one writes
    doing = f"proposing; whole parts are in {parts.folder}"
    fill(parts, mine, _results(network, split, parts, mine, job, us), lambda: stop_if_asked(stop, doing))
    us.wait()
    done = [parts.read(number) for number in parts.numbers()]
    us.wait()
    found = {image_id: proposals for part in done for image_id, proposals in part.found.items()}
    for problem in (problem for part in done for problem in part.unreadable):
        log(f"skipped: {problem}")
    if us.leads:
        count = write_proposals(job.out, found, made_by)
        shutil.rmtree(parts.folder, ignore_errors=True)
        log(
            f"wrote {job.out}: {count} proposals for {len(found)} images, {count / len(found):.1f} an image, identity "
            + ProposalTable.of(found).identity()
        )
        if not count:
            log(
                f"note: no proposal is left of what the network found: lower --min-score ({job.min_score}), or raise "
                f"--overlap"
            )
        log(f"next: hdovd extract-clip --proposals {quote(str(job.out))} ...")
    return found


def checkpointed(file: Path, job: ProposeConfig, us: Team) -> tuple[ProposalNetwork, dict[str, Any]]:
    """The network of --checkpoint, on the team's device, and what made it. Raises HdovdError if it saw other base
    classes.
    """
    network, origin = load_network(file, job.recipe)
    known, base = set(origin["protocol"]["base"]), set(load_protocol(job.protocol).base)
    if not known <= base:
        raise HdovdError(
            f"{file} was trained on boxes of {', '.join(sorted(known - base)[:8])}, which {job.protocol} does not call "
            f"base: its proposals would give novel classes away. Train a network with this protocol"
        )
    return placed(network, us.device).eval(), origin


def replaced_line(file: Path, planned: Mapping[str, Any]) -> str | None:
    """What to say of a file whose place new proposals will take; None if what is `planned` of them made it too."""
    try:
        before = read_table(file)
    except HdovdError:
        return f"note: {file} is there, but is no proposal file that can be read; these proposals will replace it"
    known = before.made_by or {}
    if all(known.get(name) == value for name, value in planned.items()):
        return None
    return (
        f"note: {file} is there with {len(before.image_id):,d} proposals made otherwise "
        f"({made_by_line(before.made_by)}); these will replace them. To keep them, stop here and give another --out"
    )


def _results(
    network: ProposalNetwork, split: Split, parts: Parts, mine: list[int], job: ProposeConfig, us: Team
) -> Iterator[tuple[int, Proposals | str]]:
    """The images of the parts `mine` in order: the id of each, and its proposals, or why it cannot be read."""
    numbers = [number for part in mine for number in parts.rows(part)]
    if not numbers:
        return
    found = found_in(Pictures(split, job.recipe, numbers), network, us, "propose")
    for number, (picture, boxes, scores) in zip(numbers, found, strict=True):
        keep = select_proposals(boxes, scores, torch.from_numpy(split.images[number].boxes), job)
        yield picture.image_id, picture.problem or Proposals(boxes[keep].numpy(), scores[keep].numpy())


def stop_if_asked(stop: StopSignal, doing: str) -> None:
    """Raises Stopped, saying what was being done, if a signal came."""
    if stop.received:
        raise Stopped(f"stopped while {doing}; the same command goes on there", exit_code(stop.received))


def select_proposals(boxes: Tensor, scores: Tensor, base: Tensor, job: ProposeConfig) -> Tensor:
    """Rows to keep of an image's proposals, best first: those that overlap a base box go, then NMS.

    Args:
        boxes: (n, 4), scores: (n,), base: (b, 4); xyxy pixels of the original image.
    """
    usable = ((boxes[:, 2:] - boxes[:, :2]) >= job.min_side).all(dim=1) & (scores >= job.min_score)
    usable &= (box_iou(boxes, base) <= job.overlap).all(dim=1)
    rows = usable.nonzero().flatten()
    return rows[nms(boxes[rows], scores[rows], job.overlap)][: job.top]
