"""Evaluation: detections of a run on validation images, their OV-COCO AP, and pictures of them.

Called by `hdovd eval`, `hdovd demo` and Python. Needs no cache: a run holds its class embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.coco import DataPaths, Split
from hdovd.coco_ap import AveragePrecision, average_precision
from hdovd.errors import HdovdError
from hdovd.faster_rcnn import FasterRCNN
from hdovd.inference import Detections, detect
from hdovd.pipelines.device import pick_device
from hdovd.pipelines.images import read_pixels
from hdovd.pipelines.loading import Batches
from hdovd.pipelines.pictures import draw_detections
from hdovd.pipelines.progress import progress
from hdovd.pipelines.run_folder import RunFolder
from hdovd.protocol import Protocol, load_protocol


@dataclass(frozen=True, slots=True)
class EvalJob:
    """`protocol` None: that of the run. `pictures`: how many validation images to draw."""

    run: Path
    data: DataPaths
    protocol: str | None = None
    device: str = "auto"
    batch_size: int = 16
    workers: int = 0
    pictures: int = 0


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`combined` uses the base/novel split at test time (METHOD section 7), `split_blind` does not."""

    protocol: Protocol
    combined: AveragePrecision
    split_blind: AveragePrecision
    images: int
    alpha: float
    beta: float
    files: list[Path]


class _Pictures(Dataset[Tensor]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, index: int) -> Tensor:
        return read_pixels(self.split, self.split.images[index])


def evaluate(job: EvalJob, log: Callable[[str], None] = print) -> EvalResult:
    """Evaluate a run; writes metrics.json, detections.json and pictures into it. Raises HdovdError for bad input."""
    run, device = RunFolder.open(job.run), pick_device(job.device)
    trained = run.protocol()
    protocol = trained if job.protocol is None else load_protocol(job.protocol)
    if (protocol.base, protocol.novel) != (trained.base, trained.novel):
        raise HdovdError(f"{job.run} was trained for the base and novel classes of protocol {trained.name}, not of {protocol.name}")
    split = job.data.load("val2017", protocol, base_only=False, log=log)
    recipe, texts = run.recipe(), run.class_embeddings()
    model = FasterRCNN(recipe, texts.shape[1], log=None)
    run.load_model(model)
    detections, blind_detections = _detect(model.to(device).eval(), texts.to(device), split, protocol, job)
    image_ids = [image.id for image in split.images]
    results = _results(split, detections)
    combined = blind = average_precision(split.annotations, split.coco_ids, image_ids, results, protocol)
    alpha = beta = 0.0
    if recipe.loss.instance.enabled:  # else there is one score, and nothing to combine
        alpha, beta = recipe.inference.alpha, recipe.inference.beta
        blind = average_precision(split.annotations, split.coco_ids, image_ids, _results(split, blind_detections), protocol)
    for ap in (combined, blind):
        ap.check_weighted_mean()
    files = [run.path / "metrics.json", run.path / "detections.json"]
    metrics = {"protocol": protocol.name, **combined.summary(), "split_blind": blind.summary(), "per_class": combined.per_class(),
               "images": len(image_ids), "alpha": alpha, "beta": beta,
               "classes_without_ground_truth": combined.without_ground_truth(), "cache": run.record()["cache"]}
    files[0].write_text(json.dumps(metrics, indent=1))
    files[1].write_text(json.dumps(results))
    if job.pictures:
        files += draw_detections(split, detections, protocol, run.path / "pictures", job.pictures)
    return EvalResult(protocol, combined, blind, len(image_ids), alpha, beta, files)


def _detect(model: FasterRCNN, texts: Tensor, split: Split, protocol: Protocol, job: EvalJob) -> tuple[list[Detections], list[Detections]]:
    """Detections of every image, with both scores and split-blind.

    Raises HdovdError if a picture cannot be read: an AP without it would not be the protocol's.
    """
    is_novel = torch.arange(len(protocol.names), device=texts.device) >= len(protocol.base)
    batches = Batches(_Pictures(split), job.batch_size, job.workers, device=texts.device)
    combined: list[Detections] = []
    blind: list[Detections] = []
    for pictures in progress(batches, "eval", "batch", len(batches)):
        for predictions in model.predict([picture.to(texts.device) for picture in pictures], texts):
            combined.append(detect(predictions, is_novel, model.recipe.inference))
            blind.append(detect(predictions, is_novel, model.recipe.inference, split_blind=True))
    return combined, blind


def _results(split: Split, detections: list[Detections]) -> list[dict[str, Any]]:
    """COCO results form."""
    results = []
    for image, found in zip(split.images, detections, strict=True):
        for (x0, y0, x1, y1), score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            results.append({"image_id": image.id, "category_id": split.coco_ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    return results
