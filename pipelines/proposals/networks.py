"""Proposal networks: trained on base boxes alone, kept as files, asked for what they find, and compared by how many
objects that is.

A file is safetensors, with the recipe and all that made the network in the metadata. While a network trains, a folder
NAME.training beside its NAME.safetensors holds the checkpoint, from which a training that was killed goes on.

With `report`: average recall of base and of novel objects, networks side by side, counted over what a network proposes,
before proposals that overlap base boxes are taken out. Novel objects are counted as a diagnosis alone: no stage chooses
anything by them.
"""

import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hdovd.cache import hash_file, require_same
from hdovd.config.recipe import Recipe, build_recipe, outside_code
from hdovd.core import HdovdError, Stopped, __version__, is_file, log, quiet, require_readable
from hdovd.data import Protocol, Split, load_protocol, read_instances
from hdovd.data.targets import flip_boxes
from hdovd.evaluation.matching import THRESHOLDS, found_at, recall
from hdovd.modeling.proposals.networks import ObjectLocalisationNetwork, ObjectnessNetwork, ProposalNetwork
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import Team, inference_autocast, placed, settled, team, training_workers
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.process import StopSignal, exit_code
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
from hdovd.pipelines.proposals.config import Detector, ProposeConfig
from hdovd.pipelines.runs import RunFolder, ap, table_lines
from hdovd.pipelines.training.hooks import RunHooks, load_checkpoint
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import data_parallel, prepared, told_shortly

KINDS: dict[Detector, type[ProposalNetwork]] = {
    Detector.OLN: ObjectLocalisationNetwork,
    Detector.RPN: ObjectnessNetwork,
}
SECTIONS = ("detector", "input", "proposals", "train")  # of a recipe: what such a network is made of
STATE = ("model", "optimizer", "step", "window", "wanted")  # of a checkpoint
Find = Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]  # images -> boxes (n, 4) and scores (n, ...) of each


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
    about = {"made_by": json.dumps(made_by), "recipe": network.recipe.to_toml()}
    replace_file(file, lambda partial: save_tensors(state, partial, about))


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
    require_readable(file)
    expected = "expected a network that hdovd propose trained (NAME.oln.safetensors): get it anew, or train one"
    try:
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata() or {}
        origin = dict(json.loads(metadata["made_by"]))
        _ = metadata["recipe"], origin["recipe"], origin["detector"], origin["annotations"]["sha256"]
        if not all(isinstance(name, str) for name in origin["protocol"]["base"]):
            raise TypeError("base names")
    except (SafetensorError, OSError) as error:
        raise HdovdError(f"{file} is no safetensors file, or damaged ({error}); {expected}") from error
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


def require_some_readable(split: Split, recipe: Recipe) -> None:
    """Raises HdovdError if no picture of a split can be read, with the first one's reason."""
    problems = (Pictures(split, recipe)[number].problem for number in range(len(split.images)))
    first = next(problems, "there is none")
    if first and all(problems):
        raise HdovdError(f"no training picture of {split.folder} can be read; first reason: {first}")


def boxes_by_class(split: Split, names: Sequence[str]) -> dict[str, int]:
    """How many boxes each class has that has any."""
    counts = Counter(label for image in split.images for label in image.labels.tolist())
    return {names[label]: counts[label] for label in sorted(counts)}


def found_in(
    pictures: Pictures, numbers: list[int], find: Find, trained_by: Recipe, us: Team, what: str
) -> Iterator[tuple[Picture, Tensor, Tensor]]:
    """Each picture of `numbers` in order, with the boxes and scores that are found in it, on the CPU.

    `find`: of a model that was trained by the recipe `trained_by`. `what`: the name of the progress bar.
    """
    config = pictures.recipe.train
    workers = training_workers(us.device, config.workers)
    batches = Batches(Subset(pictures, numbers), config.batch_size, workers, device=us.device)
    for batch in progress(batches, what, "batch", len(batches) if us.leads else 0):
        with inference_autocast(us.device, trained_by):
            scored = find([picture.pixels.to(us.device) for picture in batch])
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
    file = job.beside(f"{detector.value}.safetensors")
    folder, is_there = file.with_suffix(".training"), file.is_file() and not job.overwrite
    state = own = None
    if is_there:
        own = made_by(file)
    elif not job.overwrite and (state := load_checkpoint(folder, STATE)) is not None:
        own = state["wanted"]
    us.wait()  # all have looked, before the first one writes
    precision = None if own is None else str(own["recipe"]["train"]["precision"])
    recipe, line = settled(job.recipe, us.device, precision, "the network's")
    job = replace(job, recipe=recipe)
    wanted = settings(job, detector, split, base)
    if own is not None:
        _check_made_by(own, wanted, file if is_there else folder)
    if is_there:
        log(f"network: {file}, trained with these settings before")
    else:
        if line:
            log(line)
        _train(job, file, split, wanted, state, us, stop)
    us.wait()
    network, origin = load_network(file, recipe)
    return placed(network, us.device).eval(), origin


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


def _train(
    job: ProposeConfig,
    file: Path,
    split: Split,
    wanted: dict[str, Any],
    state: dict[str, Any] | None,
    us: Team,
    stop: StopSignal,
) -> None:
    """Write the network that `wanted` describes, from a checkpoint on if there is one."""
    config, folder = job.recipe.train, file.with_suffix(".training")
    config = config.model_copy(update={"epochs": job.recipe.proposals.epochs or config.epochs})
    if us.leads:
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).cut_log(int((state or {}).get("log_bytes", 0)))
        (folder / "stopped").unlink(missing_ok=True)  # of the call before, for job files
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
    workers = training_workers(us.device, config.workers)
    batches = TrainingBatches(Pictures(split, job.recipe), dealing, workers, device=us.device)
    what = f"train {wanted['detector']}"
    loop = Loop(model, losses_of, batches, config, us.device, what, lambda sample: sample.image_id)
    hooks = RunHooks(RunFolder(folder), network, us, stop, {"wanted": wanted}, job.save_minutes)
    if state is not None:
        hooks.restore(state, loop)
        log(f"training goes on at step {loop.step_number} of {loop.total}")
    with told_shortly():
        loop.run(hooks)
    if us.leads:
        trained = cast(ProposalNetwork, loop.result)
        learnt = {
            "training_images": len(split.images),
            "training_boxes": boxes_by_class(split, load_protocol(job.protocol).names),
            "weights_sha256": tensors_hash(trained.state_dict()),
            "hdovd": __version__,
        }
        save_network(file, trained, wanted | learnt)
        shutil.rmtree(folder, ignore_errors=True)
        log(f"wrote {file}: the network, for --checkpoint")


def stop_if_asked(stop: StopSignal, doing: str) -> None:
    """Raises Stopped, saying what was being done, if a signal came."""
    if stop.received:
        raise Stopped(f"stopped while {doing}; the same command goes on there", exit_code(stop.received))


def with_rows(split: Split, keep: Iterable[np.ndarray]) -> Split:
    """The split with the boxes of each image that a row of bool (n,) keeps."""
    kept = (
        replace(image, boxes=image.boxes[rows], labels=image.labels[rows], annotation_ids=image.annotation_ids[rows])
        for image, rows in zip(split.images, keep, strict=True)
    )
    return replace(split, images=[*kept])


MOST = (5, 10, 30, 100)  # proposals an image
GROUPS = ("base", "novel")


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
        protocol = load_protocol(job.protocol)
        validation = without_crowds(
            job.validation.load("val2017", protocol, base_only=False, exif=job.recipe.input.exif)
        )
        found = [
            _recall(name, network, validation, len(protocol.base), job, us, stop)
            for name, network in _networks(job, protocol, us, stop)
        ]
        if us.leads and job.out is not None:
            file = job.beside("recall.json")
            write_text(file, json.dumps([asdict(one) for one in found], indent=1))
            log(f"wrote {file}")
        log(recall_table(found))
        return found


def _networks(
    job: ProposeConfig, protocol: Protocol, us: Team, stop: StopSignal
) -> Iterator[tuple[str, ProposalNetwork]]:
    """Those to compare, by what the table calls them."""
    if job.trained:
        split = job.data.load("train2017", protocol, base_only=True, exif=job.recipe.input.exif)
        require_some_readable(split, job.recipe)
        for detector in job.trained:
            yield detector.value, trained_network(job, detector, split, us, stop)[0]
    for file in job.checkpoint:
        network, origin = load_network(file, job.recipe)
        yield f"{origin['detector']} {file.name}", placed(network, us.device).eval()


def without_crowds(split: Split) -> Split:
    """A box around many objects is none that a proposal could find."""
    found = read_instances(split.annotations)
    crowds = found.ids[found.crowd]
    return with_rows(split, (~np.isin(image.annotation_ids, crowds) for image in split.images))


def _recall(
    name: str, network: ProposalNetwork, split: Split, base: int, job: ProposeConfig, us: Team, stop: StopSignal
) -> Recall:
    """Of labels below `base`, and of the others."""
    numbers = list(range(len(split.images)))[us.rank :: us.world]
    found: dict[str, list[np.ndarray]] = {group: [] for group in GROUPS}
    count = 0
    results = found_in(Pictures(split, job.recipe), numbers, network.propose, network.recipe, us, f"recall {name}")
    for number, (picture, boxes, _) in zip(numbers, results, strict=True):
        stop_if_asked(stop, "counting; networks that were trained are kept")
        if picture.problem:
            raise HdovdError(f"{picture.problem}; recall without it would be another data set's")
        image, count = split.images[number], count + len(boxes)
        for group, rows in zip(GROUPS, (image.labels < base, image.labels >= base), strict=True):
            found[group].append(found_at(boxes[: max(MOST)].numpy(), image.boxes[rows]))
    shares = us.gather((found, count))
    every = {group: [one for part, _ in shares for one in part[group]] for group in GROUPS}
    objects = {group: sum(one.shape[1] for one in every[group]) for group in GROUPS}
    ar50, ar50_95 = (dict[str, dict[int, float | None]]() for _ in range(2))
    for group in GROUPS:
        shown = {most: recall(every[group], most) * 100 for most in MOST}
        ar50[group] = {most: float(at[0]) if objects[group] else None for most, at in shown.items()}
        ar50_95[group] = {most: float(at.mean()) if objects[group] else None for most, at in shown.items()}
    images = len(split.images)
    return Recall(name, images, sum(n for _, n in shares) / images, objects, ar50, ar50_95)


def recall_table(found: list[Recall]) -> str:
    """Networks side by side, base and novel, as text."""
    head = ("network", "objects", *(f"AR50@{most}" for most in MOST), *(f"AR@{most}" for most in MOST))
    rows = [
        (one.network, group, *map(ap, one.ar50[group].values()), *map(ap, one.ar50_95[group].values()))
        for one in found
        for group in GROUPS
    ]
    counts = " and ".join(f"{found[0].objects[group]} {group}" for group in GROUPS)
    return "\n".join(
        [
            f"Average recall in percent at IoU 0.5 (AR50) and {THRESHOLDS[0]}:{THRESHOLDS[-1]} (AR), {found[0].images} "
            f"pictures, {counts} objects.",
            "Novel is a diagnosis: choose nothing by it.",
            *table_lines(head, rows, set(head[2:])),
        ]
    )
