"""A trained proposal network as a file: safetensors, with its recipe and all that made it in the metadata.

The pictures and boxes of a split as the proposal networks see them, and what the networks find in them.
"""

import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.cache.identity import differences
from hdovd.config.plugins import outside_code
from hdovd.config.recipe import Recipe, build_recipe
from hdovd.core.errors import HdovdError, is_file, require_readable
from hdovd.core.version import __version__
from hdovd.data.coco import Split
from hdovd.data.protocol import load_protocol
from hdovd.data.targets import flip_boxes
from hdovd.modeling.proposals.base import ObjectnessNetwork, ProposalNetwork
from hdovd.modeling.proposals.oln import ObjectLocalisationNetwork
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import Team, training_workers
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.common.precision import inference_autocast
from hdovd.pipelines.common.tensors import load_tensors, save_tensors, tensors_hash
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.dataloading.sampler import Draw, is_flipped, key_of
from hdovd.pipelines.proposals.config import Detector, NetworkConfig, require_network

KINDS: dict[Detector, type[ProposalNetwork]] = {
    Detector.OLN: ObjectLocalisationNetwork,
    Detector.RPN: ObjectnessNetwork,
}
SECTIONS = ("detector", "input", "proposals", "train")  # of a recipe: what such a network is made of


def build_network(detector: Detector, recipe: Recipe, initialise: bool = True) -> ProposalNetwork:
    return KINDS[detector](recipe, initialise)


def settings(job: NetworkConfig, split: Split) -> dict[str, Any]:
    """What a training is determined by: detector, recipe, protocol, and the annotation file with its sha256."""
    recipe, protocol = job.recipe.model_dump(by_alias=True), load_protocol(job.protocol)
    # A key that came later is left out at its default: files of before it was there say the same.
    recipe["train"] = job.recipe.train.model_dump(exclude={"workers", "compile"}, exclude_defaults=True)
    body = recipe["detector"]["backbone"]
    if is_file(body["weights"]):  # what is in it counts, not where it lies
        body["weights"] = f"sha256:{_sha256(Path(body['weights']))}"
    return {
        "detector": job.detector.value,
        "recipe": {name: recipe[name] for name in SECTIONS},
        "protocol": {"name": protocol.name, "base": list(protocol.base)},
        "annotations": {"file": str(split.annotations.resolve()), "sha256": _sha256(split.annotations)},
    }


def provenance(job: NetworkConfig, split: Split, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything that made a network, as plain values: `settings`, the boxes that it saw by class, its weights' sha256,
    the version.

    Args:
        split: what it was trained on. weights: of the trained network.
    """
    counts = Counter(label for image in split.images for label in image.labels.tolist())
    names = load_protocol(job.protocol).names
    boxes = {names[label]: counts[label] for label in sorted(counts)}
    return {
        **settings(job, split),
        "training_images": len(split.images),
        "training_boxes": boxes,
        "weights_sha256": tensors_hash(weights),
        "hdovd": __version__,
    }


def save_network(file: Path, network: ProposalNetwork, made_by: dict[str, Any]) -> None:
    """The file is replaced whole or not at all. Raises HdovdError."""
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    metadata = {"made_by": json.dumps(made_by), "recipe": network.recipe.to_toml()}
    replace_file(file, lambda partial: save_tensors(state, partial, metadata))


def made_by(file: Path) -> dict[str, Any]:
    """What made the network in a file. Raises HdovdError for a file that holds none."""
    return _described(file)[1]


def check_made_by(found: dict[str, Any], wanted: dict[str, Any], file: Path) -> None:
    """Raises HdovdError naming what a training was begun with otherwise than is asked for now."""
    if lines := differences(_compared(wanted), _compared(found), sides=("asked for", "made with")):
        raise HdovdError(
            f"{file} was made otherwise:\n  "
            + "\n  ".join(lines)
            + "\nGive another --out, --overwrite to train anew, or "
            "--checkpoint FILE to propose with a network as it is"
        )


def load_network(file: Path, trusted: Recipe | None = None) -> tuple[ProposalNetwork, dict[str, Any]]:
    """A trained network, on the CPU, and what made it.

    A backbone that is code of the user's own is built only if `trusted`, the recipe given, names it too: a file must
    not choose what is imported.

    Raises HdovdError if the file holds no network, or one of another shape than its metadata says.
    """
    metadata, origin = _described(file)
    try:
        recipe, detector = build_recipe(tomllib.loads(metadata["recipe"]), f"in {file}"), Detector(origin["detector"])
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
    network = build_network(detector, recipe, initialise=False)
    try:
        network.load_state_dict(load_tensors(file))
    except RuntimeError as error:
        raise HdovdError(f"{file} does not fit the recipe in its metadata: {error}") from error
    return network, origin


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compared(origin: dict[str, Any]) -> dict[str, Any]:
    """Without what a file is called."""
    return {
        "detector": origin["detector"],
        "recipe": origin["recipe"],
        "base classes": origin["protocol"]["base"],
        "annotations sha256": origin["annotations"]["sha256"],
    }


def _described(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata of a network's file, and of them what made it."""
    require_network(file)
    require_readable(file)
    try:
        with safe_open(file, "pt") as tensors:
            metadata = dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise HdovdError(
            f"{file} is no safetensors file, or damaged ({error}); expected a network that hdovd propose trained"
        ) from error
    if not {"made_by", "recipe"} <= metadata.keys():
        raise HdovdError(
            f"{file} holds tensors, but no proposal network: expected one that hdovd propose trained "
            f"(NAME.oln.safetensors)"
        )
    try:
        origin = dict(json.loads(metadata["made_by"]))
        _ = origin["recipe"], origin["detector"], origin["annotations"]["sha256"]
        if not all(isinstance(name, str) for name in origin["protocol"]["base"]):
            raise TypeError("base names")
    except (ValueError, KeyError, TypeError) as error:
        raise HdovdError(
            f"{file}: its metadata does not say what made it ({error!r}); get it anew, or train one"
        ) from error
    return metadata, origin


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

    def __init__(self, split: Split, recipe: Recipe, numbers: list[int] | None = None) -> None:
        """`numbers`: those of the split's images that are wanted, in order; None: all."""
        self.split, self.recipe = split, recipe
        self.numbers = list(range(len(split.images))) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, wanted: int | Draw) -> Picture:
        image = self.split.images[self.numbers[wanted.index if isinstance(wanted, Draw) else wanted]]
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
        except HdovdError as error:
            first = first or str(error)
        else:
            return
    raise HdovdError(f"no training picture of {split.folder} can be read; first reason: {first}")


def found_in(
    pictures: Pictures, network: ProposalNetwork, us: Team, what: str
) -> Iterator[tuple[Picture, Tensor, Tensor]]:
    """Each picture in order, with the boxes (n, 4) and scores (n,) that a network proposes in it, on the CPU.

    `what`: the name of the progress bar.
    """
    config = pictures.recipe.train
    batches = Batches(pictures, config.batch_size, training_workers(us.device, config.workers), device=us.device)
    for batch in progress(batches, what, "batch", len(batches) if us.leads else 0):
        with inference_autocast(us.device, network.recipe):
            scored = network.propose([picture.pixels.to(us.device) for picture in batch])
        for picture, (boxes, scores) in zip(batch, scored, strict=True):
            yield picture, boxes.cpu(), scores.cpu()
