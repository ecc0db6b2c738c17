"""Export: the detector of a run as one file for other programs, with classes as an input. Called by `hdovd export` and Python.

The file is run before it gets its name: what does not find the model's detections is no export of it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hdovd.core.errors import HdovdError
from hdovd.core.version import __version__
from hdovd.modeling.base import build_detector
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.export import forms as model_forms
from hdovd.pipelines.export.check import Checked, check, made_up_pictures
from hdovd.pipelines.export.config import ExportModelConfig
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.weights import Weights

TOLERANCE = 1e-3  # of boxes in percent of the input's long side, and of scores


@dataclass(frozen=True, slots=True)
class ExportedModel:
    file: Path
    bytes: int
    checked: Checked


def export_model(job: ExportModelConfig, log: Callable[[str], None] = print) -> ExportedModel:
    """Write the detector of a run to one file. Raises HdovdError for bad input, and if the file does not find what the model finds."""
    model_forms.require(job.form)
    job.check()
    run = RunFolder(job.run, job.trust)
    recipe, protocol, texts = run.recipe(), run.protocol(), run.class_embeddings().float()
    pictures = made_up_pictures(recipe.input) + [_read(path) for path in job.check_images]
    model = build_detector(recipe, texts.shape[1], log=None)
    model_forms.require_traceable(job.form, model)
    run.load_model(model, job.weights.file)
    is_novel = torch.arange(len(texts)) >= len(protocol.base)
    log(f"{job.run}: {job.weights.value} weights, {len(texts)} classes, embeddings of {texts.shape[1]} numbers")
    example = (pictures[0][:, :90, :120].contiguous(), texts, is_novel)  # smaller, and of another shape, than what is checked

    checked: list[Checked] = []

    def write(partial: Path) -> None:
        try:
            model_forms.write(job.form, model, example, carried(run, job.weights), partial)
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as error:
            raise RuntimeError(f"torch {torch.__version__} cannot export a detector with backbone {recipe.detector.backbone.name}: "
                               f"{error}") from error

        checked.append(check(model_forms.open_model(job.form, partial)[0], model, texts, is_novel, pictures))
        if not checked[0].difference <= TOLERANCE:
            raise HdovdError(f"{job.out} was not written: run as {job.form.value}, the detector with backbone "
                             f"{recipe.detector.backbone.name} differs from the model by {checked[0].difference:.2g} (score, or percent of "
                             f"its input's long side), more than {TOLERANCE:g}; try --format safetensors")

    replace_file(job.out, write)
    return ExportedModel(job.out, job.out.stat().st_size, checked[0])


def carried(run: RunFolder, weights: Weights) -> dict[str, str]:
    """The text of `model_forms.CARRIED` for a run."""
    protocol, texts, made = run.protocol(), run.class_embeddings().float(), _made_by(run)
    about = (f"image: (3, height, width) uint8 RGB, as decoded, any size; resizing and normalisation are inside. texts: (classes, "
             f"{texts.shape[1]}) float32, CLIP text embeddings of any class names. is_novel: (classes,) bool, true for classes that had no "
             "boxes in training. boxes: (detections, 4) x0, y0, x1, y1 pixels of the image. scores: (detections,) best first. labels: "
             "(detections,) int64, rows of texts. Threshold, NMS within each class and cap are inside, as in recipe [inference].")
    values = {
        "hdovd": __version__, "about": about,
        "class_names": json.dumps(protocol.names), "is_novel": json.dumps([name in set(protocol.novel) for name in protocol.names]),
        "class_embeddings": base64.b64encode(texts.numpy().astype("<f4").tobytes()).decode(), "embedding_size": str(texts.shape[1]),
        "clip": json.dumps(made.get("clip")), "templates": json.dumps(made.get("templates")),
        "protocol": protocol.name, "weights": weights.value, "recipe": run.recipe().to_toml()}
    assert values.keys() == model_forms.CARRIED.keys()
    return values


def _made_by(run: RunFolder) -> dict[str, object]:
    """What made the run's class embeddings, as its cache had it."""
    return dict(run.record()["cache"]["levels"].get("class", {}).get("inputs", {}))


def _read(path: Path) -> Tensor:
    try:
        return decode(path).pixels
    except HdovdError as error:
        raise HdovdError(f"--check-image {error}") from error
