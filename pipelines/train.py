"""Training: stream pictures and cached rows into the detector. CLIP is not imported in this process.

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

from hdovd.cache.reader import FeatureCache
from hdovd.coco import DataPaths, Split
from hdovd.config import LossConfig, Recipe
from hdovd.faster_rcnn import FasterRCNN
from hdovd.pipelines.device import pick_device
from hdovd.pipelines.fit import fit, shuffled
from hdovd.pipelines.run_folder import RunFolder
from hdovd.pipelines.training_set import Sample, TrainingSet
from hdovd.protocol import load_protocol


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training run."""

    data: DataPaths
    cache: Path
    out: Path
    recipe: Recipe
    protocol: str = "ov-coco"
    device: str = "auto"
    overwrite: bool = False


def train(job: TrainJob, log: Callable[[str], None] = print) -> RunFolder:
    """Train one detector and return its folder. Raises HdovdError for bad input or a loss that is not finite."""
    recipe, protocol, device = job.recipe, load_protocol(job.protocol), pick_device(job.device)
    split = job.data.load("train2017", protocol, base_only=True, log=log)
    cache = FeatureCache(job.cache)
    data = TrainingSet(split, cache, recipe, log)
    class_embeddings = torch.from_numpy(cache.class_embeddings(protocol.names))
    torch.manual_seed(recipe.train.seed)
    model = FasterRCNN(recipe, cache.dim, log).to(device)
    run = RunFolder.create(job.out, recipe, protocol, class_embeddings, _record(cache, split), overwrite=job.overwrite)
    log(f"{len(data)} images, {sum(len(i.boxes) for i in data.images)} base boxes of {len(protocol.base)} classes; "
        f"distillation levels: {enabled_levels(recipe.loss)}; {device}")
    texts = class_embeddings[: len(protocol.base)].to(device)

    def losses_of(samples: list[Sample]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model([picture.to(device, non_blocking=True) for picture, _, _ in samples],
                                          [targets.to(device) for _, targets, _ in samples], texts)
        return losses

    fit(model, losses_of, shuffled(data, recipe.train, device), recipe.train, device, "train",
        on_interval=run.log, on_epoch=lambda: run.save_model(model))
    log(f"wrote {run.path}")
    return run


def enabled_levels(loss: LossConfig) -> str:
    """The levels of distillation that are on, in words."""
    levels = {"instance": loss.instance.enabled, "class": loss.class_.enabled, "image": loss.image.enabled}
    return ", ".join(name for name, on in levels.items() if on) or "none (base-only)"


def _record(cache: FeatureCache, split: Split) -> dict[str, object]:
    return {"cache": cache.identity(), "skipped": split.skips.by_reason, "command": sys.argv,
            "versions": {name: version(name) for name in ("hdovd", "torch", "torchvision", "zarr")}}
