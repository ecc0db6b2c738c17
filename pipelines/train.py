"""Training: stream pictures and cached rows into the detector, from a Zarr cache or tar shards. CLIP is not imported in this process.

Called by `hdovd train`, `hdovd demo` and Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from hdovd.cache.catalog import Catalog, RunRecord
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import DEFAULT_SET
from hdovd.cache.tar_shards import is_tar_form
from hdovd.coco import DataPaths
from hdovd.config import LossConfig, Recipe, TrainConfig
from hdovd.errors import HdovdError
from hdovd.faster_rcnn import FasterRCNN
from hdovd.pipelines.block_shuffle import BlockShuffle
from hdovd.pipelines.device import pick_device
from hdovd.pipelines.fit import fit, shuffled
from hdovd.pipelines.loading import Batches, StreamBatches
from hdovd.pipelines.run_folder import RunFolder
from hdovd.pipelines.tar_training import TarTrainingSet
from hdovd.pipelines.training_set import Sample, TrainingSet
from hdovd.protocol import Protocol, load_protocol


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training run. `cache`: a Zarr cache, with the `data` that it was made of, or tar shards, which need no other data."""

    data: DataPaths
    cache: Path | str
    out: Path
    recipe: Recipe
    protocol: str = "ov-coco"
    device: str = "auto"
    overwrite: bool = False
    features: str = DEFAULT_SET


def train(job: TrainJob, log: Callable[[str], None] = print) -> RunFolder:
    """Train one detector and return its folder. Raises HdovdError for bad input or a loss that is not finite."""
    recipe, protocol, device = job.recipe, load_protocol(job.protocol), pick_device(job.device)
    data = training_data(job, protocol, log)
    class_embeddings = torch.from_numpy(data.class_embeddings(protocol.names))
    torch.manual_seed(recipe.train.seed)
    model = FasterRCNN(recipe, data.dim, log).to(device)
    run = RunFolder.create(job.out, recipe, protocol, class_embeddings, _record(data), overwrite=job.overwrite)
    if isinstance(data, TrainingSet):
        _tell_cache(job, data.cache, run, log)
    log(f"{data.describe()} of {len(protocol.base)} classes; distillation levels: {enabled_levels(recipe.loss)}; {device}")
    batches = batches_of(data, recipe.train, device)
    train_on(model, batches, class_embeddings[: len(protocol.base)], recipe, device, run)
    log(f"wrote {run.path}")
    return run


def training_data(job: TrainJob, protocol: Protocol, log: Callable[[str], None]) -> TrainingSet | TarTrainingSet:
    """Tar shards alone, or a Zarr cache with the data set that it was made of."""
    if is_tar_form(job.cache):
        if job.data != DataPaths():
            log("note: the shards hold pictures and boxes; --data, --images and --annotations are not read")
        return TarTrainingSet(str(job.cache), protocol, job.recipe, log, features=job.features)
    split = job.data.load("train2017", protocol, base_only=True, log=log)
    return TrainingSet(split, FeatureCache(job.cache, job.features), job.recipe, log)


def batches_of(data: TrainingSet | TarTrainingSet, config: TrainConfig, device: torch.device) -> Batches[Sample]:
    """The batches of an epoch, shuffled; as many of them whatever the data come from."""
    if isinstance(data, TrainingSet):
        in_blocks = data.recipe.loss.uses_pseudo_boxes and data.cache.reads_best_in_blocks
        order = BlockShuffle(len(data), config.seed, workers=config.workers, batch_size=config.batch_size) if in_blocks else None
        return shuffled(data, config, device, sampler=order)
    return StreamBatches(data, len(data), config.batch_size, config.workers, device=device, seed=config.seed)


def train_on(model: FasterRCNN, batches: Batches[Sample], class_embeddings: Tensor, recipe: Recipe, device: torch.device,
             run: RunFolder) -> None:
    """Train a model on batches, with the text embeddings (Kb, D) of the base classes; losses and weights go to `run`."""
    texts = class_embeddings.to(device)

    def losses_of(samples: list[Sample]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model([picture.to(device, non_blocking=True) for picture, _, _ in samples],
                                          [targets.to(device) for _, targets, _ in samples], texts)
        return losses

    fit(model, losses_of, batches, recipe.train, device, "train", on_interval=run.log, on_epoch=lambda: run.save_model(model))


def _tell_cache(job: TrainJob, cache: FeatureCache, run: RunFolder, log: Callable[[str], None]) -> None:
    """Record in the cache that this run uses it, so that `hdovd cache gc` keeps what it needs."""
    try:
        Catalog(job.cache).record_run(RunRecord(str(run.path.resolve()), cache.set.levels))
    except HdovdError as error:
        log(f"note: {error}; hdovd cache gc will not know of this run")


def enabled_levels(loss: LossConfig) -> str:
    """The levels of distillation that are on, in words."""
    levels = {"instance": loss.instance.enabled, "class": loss.class_.enabled, "image": loss.image.enabled}
    return ", ".join(name for name, on in levels.items() if on) or "none (base-only)"


def _record(data: TrainingSet | TarTrainingSet) -> dict[str, object]:
    return {**data.record(), "command": sys.argv,
            "versions": {name: version(name) for name in ("hdovd", "torch", "torchvision", "zarr")}}
