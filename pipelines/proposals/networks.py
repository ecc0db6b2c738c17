"""Proposal networks: trained on base boxes alone, kept as files, and asked for what they find.

A file is safetensors, with the recipe and all that made the network in the metadata. While a network trains, a folder
NAME.training beside its NAME.safetensors holds the checkpoint, from which a training that was killed goes on.
"""

import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hdovd.cache.identity import hash_file, require_same
from hdovd.config.detector import AUTO
from hdovd.config.recipe import Recipe, build_recipe, outside_code
from hdovd.core import __version__
from hdovd.core.errors import HdovdError, is_file, require_readable
from hdovd.core.log import log
from hdovd.data.coco import Split
from hdovd.data.protocol import load_protocol
from hdovd.data.targets import flip_boxes
from hdovd.modeling.proposals.networks import ObjectLocalisationNetwork, ObjectnessNetwork, ProposalNetwork
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import Team, inference_autocast, placed, settled, training_workers
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.common.tensors import load_tensors, save_tensors, tensors_hash
from hdovd.pipelines.dataloading.loader import (
    Batches,
    Dealing,
    Draw,
    TrainingBatches,
    is_flipped,
    key_of,
    plain_shuffle,
)
from hdovd.pipelines.proposals.config import Detector, ProposeConfig, require_network
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.training.hooks import RunHooks, load_checkpoint
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import data_parallel, prepared, told_shortly

KINDS: dict[Detector, type[ProposalNetwork]] = {
    Detector.OLN: ObjectLocalisationNetwork,
    Detector.RPN: ObjectnessNetwork,
}
SECTIONS = ("detector", "input", "proposals", "train")  # of a recipe: what such a network is made of
STATE = ("model", "optimizer", "step", "window", "wanted")  # of a checkpoint


def network_file(job: ProposeConfig, detector: Detector) -> Path:
    return job.beside(f"{detector.value}.safetensors")


def settings(job: ProposeConfig, detector: Detector, split: Split, base: Sequence[str] = ()) -> dict[str, Any]:
    """What a training is determined by: detector, recipe, protocol, and the annotation file with its sha256. `base`:
    the classes whose boxes are learnt; by default all base classes.
    """
    recipe, protocol = job.recipe.model_dump(by_alias=True), load_protocol(job.protocol)
    # A key that came later is left out at its default: files of before it was there say the same.
    recipe["train"] = job.recipe.train.model_dump(exclude={"workers", "compile"}, exclude_defaults=True)
    recipe["train"]["epochs"] = recipe["proposals"].pop("epochs") or recipe["train"]["epochs"]
    body = recipe["detector"]["backbone"]
    if is_file(body["weights"]):  # what is in it counts, not where it lies
        body["weights"] = f"sha256:{hash_file(Path(body['weights']))}"
    return {
        "detector": detector.value,
        "recipe": {name: recipe[name] for name in SECTIONS},
        "protocol": {"name": protocol.name, "base": list(base or protocol.base)},
        "annotations": {"file": str(split.annotations.resolve()), "sha256": hash_file(split.annotations)},
    }


def save_network(file: Path, network: ProposalNetwork, made_by: Mapping[str, Any]) -> None:
    """The file is replaced whole or not at all. Raises HdovdError."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    metadata = {"made_by": json.dumps(made_by), "recipe": network.recipe.to_toml()}
    replace_file(file, lambda partial: save_tensors(state, partial, metadata))


def made_by(file: Path) -> dict[str, Any]:
    """What made the network in a file. Raises HdovdError for a file that holds none."""
    return _described(file)[1]


def load_network(file: Path, trusted: Recipe | None = None) -> tuple[ProposalNetwork, dict[str, Any]]:
    """A trained network, on the CPU, and what made it.

    A backbone that is code of the user's own is built only if `trusted`, the recipe given, names it too: a file must
    not choose what is imported.

    Raises HdovdError if the file holds no network, or one of another shape than its metadata says.
    """
    text, origin = _described(file)
    try:
        recipe, detector = build_recipe(tomllib.loads(text), f"in {file}"), Detector(origin["detector"])
    except ValueError as error:
        raise HdovdError(
            f"{file}: its metadata cannot be read ({error}); was it written by another version of hdovd?"
        ) from error
    name = outside_code(recipe).get("detector.backbone.name")
    if name is not None and (trusted is None or trusted.detector.backbone.name != name):
        raise HdovdError(
            f"{file} wants the backbone {name}, code outside of hdovd: if you trust it, say so with "
            f"--set detector.backbone.name={name}"
        )
    network = KINDS[detector](recipe, False)
    try:
        network.load_state_dict(load_tensors(file))
    except RuntimeError as error:
        raise HdovdError(f"{file} does not fit the recipe in its metadata: {error}") from error
    return network, origin


def _described(file: Path) -> tuple[str, dict[str, Any]]:
    """The recipe of a network's file, as text, and what made it."""
    require_network(file)
    require_readable(file)
    expected = "expected a network that hdovd propose trained (NAME.oln.safetensors): get it anew, or train one"
    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HdovdError(f"{file} is no safetensors file, or damaged ({error}); {expected}") from error
    try:
        origin = dict(json.loads(metadata["made_by"]))
        _ = metadata["recipe"], origin["recipe"], origin["detector"], origin["annotations"]["sha256"]
        if not all(isinstance(name, str) for name in origin["protocol"]["base"]):
            raise TypeError("base names")
    except (ValueError, KeyError, TypeError) as error:
        raise HdovdError(
            f"{file} does not say what made it, and is no proposal network ({error!r}); {expected}"
        ) from error
    return metadata["recipe"], origin


class Picture(NamedTuple):
    """pixels (3, h, w) uint8, boxes (n, 4) xyxy. `problem`: why the picture cannot be read; it is black then, and has
    no boxes.
    """

    pixels: Tensor
    boxes: Tensor
    image_id: int
    problem: str


class Pictures(Dataset[Picture]):
    """A picture by number; or by draw, and then flipped as its key says.

    One that cannot be read is there all the same, without anything in it: every process has its part of every batch, so
    that a run over several of them does not wait for one which has nothing to do.
    """

    def __init__(self, split: Split, recipe: Recipe) -> None:
        self.split, self.recipe = split, recipe

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, wanted: int | Draw) -> Picture:
        image = self.split.images[wanted.index if isinstance(wanted, Draw) else wanted]
        try:
            pixels, boxes = read_pixels(self.split, image), torch.from_numpy(image.boxes)
        except HdovdError as error:
            return Picture(
                torch.zeros(3, image.height, image.width, dtype=torch.uint8), torch.zeros(0, 4), image.id, str(error)
            )
        if isinstance(wanted, Draw) and is_flipped(
            key_of(self.recipe.train.seed, wanted.epoch, image.id), self.recipe.input.flip
        ):
            pixels, boxes = pixels.flip(-1), flip_boxes(boxes, image.width)
        return Picture(pixels, boxes, image.id, "")


def require_some_readable(split: Split) -> None:
    """Raises HdovdError if no picture of a split can be read, with the first one's reason."""
    first = ""
    for image in split.images:
        try:
            read_pixels(split, image)
            return
        except HdovdError as error:
            first = first or str(error)
    raise HdovdError(f"no training picture of {split.folder} can be read; first reason: {first}")


class Finder(Protocol):
    """What finds boxes in pictures: a proposal network, or a detector that takes its place."""

    @property
    def recipe(self) -> Recipe: ...

    def propose(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]: ...


def found_in(
    pictures: Pictures, numbers: list[int], network: Finder, us: Team, what: str
) -> Iterator[tuple[Picture, Tensor, Tensor]]:
    """Each picture of `numbers` in order, with the boxes (n, 4) and scores (n,) that a network proposes in it, on the
    CPU.

    `what`: the name of the progress bar.
    """
    config = pictures.recipe.train
    workers = training_workers(us.device, config.workers)
    batches = Batches(Subset(pictures, numbers), config.batch_size, workers, device=us.device)
    for batch in progress(batches, what, "batch", len(batches) if us.leads else 0):
        with inference_autocast(us.device, network.recipe):
            scored = network.propose([picture.pixels.to(us.device) for picture in batch])
        for picture, (boxes, scores) in zip(batch, scored, strict=True):
            yield picture, boxes.cpu(), scores.cpu()


def trained_network(
    job: ProposeConfig, detector: Detector, split: Split, us: Team, stop: StopSignal, base: Sequence[str] = ()
) -> tuple[ProposalNetwork, dict[str, Any]]:
    """A network of a job, on the team's device, and what made it: from its file, or trained and put there. `base`: as
    in `settings`, of the boxes in `split`.

    Raises HdovdError if the file, or the checkpoint of a training that was killed, was made otherwise; Stopped if a
    signal came.
    """
    job, line = settled_job(job, detector, us)
    wanted, file = settings(job, detector, split, base), network_file(job, detector)
    if file.is_file() and not job.overwrite:
        _check_made_by(made_by(file), wanted, file)
        log(f"network: {file}, trained with these settings before")
    else:
        if line:
            log(line)
        _train(job, file, split, wanted, us, stop)
    us.wait()
    network, origin = load_network(file, job.recipe)
    return placed(network, us.device).eval(), origin


def settled_job(job: ProposeConfig, detector: Detector, us: Team) -> tuple[ProposeConfig, str]:
    """The job with a precision that is not auto, and the line to say of it: that of the network, or of its training,
    that is there.
    """
    file, origin = network_file(job, detector), None
    if job.recipe.train.precision == AUTO and not job.overwrite:
        if file.is_file():
            origin = made_by(file)
        elif (state := load_checkpoint(file.with_suffix(".training"), STATE)) is not None:
            origin = state["wanted"]
    own = None if origin is None else str(origin["recipe"]["train"]["precision"])
    recipe, line = settled(job.recipe, us.device, own, "the network's")
    return replace(job, recipe=recipe), line


def _check_made_by(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    """Raises HdovdError naming what a training was begun with otherwise than is asked for now; what files are called
    does not count.
    """
    asked, made = (
        {
            "detector": origin["detector"],
            "recipe": origin["recipe"],
            "base classes": origin["protocol"]["base"],
            "annotations sha256": origin["annotations"]["sha256"],
        }
        for origin in (wanted, found)
    )
    require_same(
        asked,
        made,
        f"{file} was made otherwise",
        "Give another --out, --overwrite to train anew, or --checkpoint FILE to propose with a network as it is",
        sides=("asked for", "made with"),
    )


def _train(job: ProposeConfig, file: Path, split: Split, wanted: dict[str, Any], us: Team, stop: StopSignal) -> None:
    config, folder = job.recipe.train, file.with_suffix(".training")
    config = config.model_copy(update={"epochs": job.recipe.proposals.epochs or config.epochs})
    state = None if job.overwrite else load_checkpoint(folder, STATE)
    us.wait()  # all have looked, before the first one writes
    if state is not None:
        _check_made_by(state["wanted"], wanted, folder)
    if us.leads:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stopped").unlink(missing_ok=True)  # of the call before, for job files
    require_some_readable(split)
    torch.manual_seed(config.seed)
    network = prepared(KINDS[Detector(wanted["detector"])](job.recipe, state is None), job.recipe, us)
    model = network if us.world == 1 else data_parallel(network)

    def losses_of(samples: list[Picture], epoch: int) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(
            [s.pixels.to(us.device, non_blocking=True) for s in samples],
            [s.boxes.to(us.device) for s in samples],
            [key_of(config.seed, epoch, s.image_id) for s in samples],
        )
        return losses

    order = partial(plain_shuffle, len(split.images), config.seed)
    dealing = Dealing(order, config.batch_size, us.rank, us.world, config.accumulate)
    batches = TrainingBatches(
        Pictures(split, job.recipe), dealing, training_workers(us.device, config.workers), device=us.device
    )
    loop = Loop(
        model, losses_of, batches, config, us.device, f"train {wanted['detector']}", lambda sample: sample.image_id
    )
    hooks = RunHooks(RunFolder(folder), network, us, stop, {"wanted": wanted}, job.save_minutes)
    if state is not None:
        hooks.restore(state, loop)
        log(f"training goes on at step {loop.step_number} of {loop.total}")
    with told_shortly():
        loop.run(hooks)
    if us.leads:
        trained = cast(ProposalNetwork, loop.result)
        save_network(file, trained, {**wanted, **_learnt(job, split, trained)})
        shutil.rmtree(folder, ignore_errors=True)
        log(f"wrote {file}: the network, for --checkpoint")


def _learnt(job: ProposeConfig, split: Split, network: ProposalNetwork) -> dict[str, Any]:
    """What `made_by` says of a training besides its settings: boxes by class, the weights' sha256, the version."""
    counts = Counter(label for image in split.images for label in image.labels.tolist())
    names = load_protocol(job.protocol).names
    return {
        "training_images": len(split.images),
        "training_boxes": {names[label]: counts[label] for label in sorted(counts)},
        "weights_sha256": tensors_hash(network.state_dict()),
        "hdovd": __version__,
    }
