"""Evaluation: detections of a run on validation images, their OV-COCO AP, and pictures of them.

Called by `hdovd eval`, `hdovd demo` and Python. Needs no cache: a run holds its class embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hdovd.core.errors import HdovdError
from hdovd.data.protocol import Protocol, load_protocol
from hdovd.evaluation.coco import AveragePrecision
from hdovd.evaluation.engines import require
from hdovd.evaluation.tide import ErrorBreakdown, break_down
from hdovd.modeling.base import build_detector
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import pick_device, placed
from hdovd.pipelines.common.precision import inference_precision
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.detections_io import found_of
from hdovd.pipelines.evaluation.pictures import draw_detections
from hdovd.pipelines.evaluation.validation import Validation, results
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.weights import weights_hash


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`combined` uses the base/novel split at test time (METHOD section 7), `split_blind` does not. `errors`: of `combined`."""

    protocol: Protocol
    combined: AveragePrecision
    split_blind: AveragePrecision
    errors: ErrorBreakdown
    images: int
    alpha: float
    beta: float
    files: list[Path]


def evaluate(job: EvalConfig, log: Callable[[str], None] = print) -> EvalResult:
    """Evaluate a run; writes metrics.json, detections.json and pictures into it. Raises HdovdError for bad input."""
    job.check()
    run, device = RunFolder(job.run, job.trust), pick_device(job.device)
    trained = run.protocol()
    protocol = trained if job.protocol is None else load_protocol(job.protocol)
    if (protocol.base, protocol.novel) != (trained.base, trained.novel):
        raise HdovdError(f"{job.run} was trained for the base and novel classes of protocol {trained.name}, not of {protocol.name}")
    recipe, texts = run.recipe(), run.class_embeddings()
    validation = Validation(job.data, protocol, device, exif=recipe.input.exif, batch_size=job.batch_size, workers=job.workers,
                            engine=job.engine, log=log)
    model = build_detector(recipe, texts.shape[1], log=None)
    run.load_model(model, job.weights.file)
    found = validation.run(placed(model, device), texts)
    split, combined, blind = validation.split, found.combined, found.split_blind
    rows = results(split, found.detections)
    errors = break_down(found_of(rows, split.coco_ids), validation.truth.objects, protocol)
    alpha = beta = 0.0
    if combined is not blind:  # else there is one score, and nothing to combine
        alpha, beta = recipe.inference.alpha, recipe.inference.beta
    files = [run.path / "metrics.json", run.path / "detections.json"]
    metrics = {"protocol": protocol.name, **combined.summary(), "split_blind": blind.summary(), "per_class": combined.per_class(),
               "images": len(split.images), "alpha": alpha, "beta": beta,
               "classes_without_ground_truth": combined.without_ground_truth(), "cache": run.record()["cache"],
               "engine": {"name": job.engine.value, "version": require(job.engine)}, "precision": inference_precision(device, recipe),
               "weights": job.weights.value, "weights_hash": weights_hash(run.path / job.weights.file), "errors": errors.to_tree()}
    write_text(files[1], json.dumps(rows))
    write_text(files[0], json.dumps(metrics, indent=1))
    if job.pictures:
        files += draw_detections(split, found.detections, protocol, run.path / "pictures", job.pictures)
    return EvalResult(protocol, combined, blind, errors, len(split.images), alpha, beta, files)
