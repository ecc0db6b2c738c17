"""The RT-DETR that can be traced finds what `predict` and `detect` find; so does a trace of it, in pictures of other
sizes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adamixer_scenes import DIM, pictures, unit
from detections_alike import require_alike
from rtdetr_scenes import detector

from hdovd.config.recipe import PRESETS
from hdovd.modeling.boxes import Detections, detect
from hdovd.modeling.export.detectors import ExportableDetector
from hdovd.modeling.rtdetr.model import RTDETR
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import CARRIED, Run, open_model, write

SIZES = [(96, 80), (37, 91), (300, 40), (7, 5), (64, 64)]  # height, width


def written(form: ModelForm, model: RTDETR, file: Path) -> Run:
    example = (pictures((90, 120))[0].contiguous(), unit(4, DIM, seed=1), torch.tensor([True, False, False, True]))
    write(form, model, example, dict.fromkeys(CARRIED, ""), file)
    return open_model(form, file)[0]


def same(model: RTDETR, run: Run) -> None:
    for size in SIZES:
        for classes in (0, 1, 9, 300):
            picture, texts, is_novel = (
                pictures(size, first=size[0])[0],
                unit(classes, DIM, seed=classes),
                torch.arange(classes) % 3 == 0,
            )
            expected = detect(model.predict([picture], texts)[0], is_novel, model.recipe.inference)
            with torch.inference_mode():
                found = Detections(*run(picture, texts, is_novel))
            assert len(found.labels) > 0 or classes < 2
            require_alike(found, expected, pixels=1e-3, score=5e-4)


SETTINGS = {
    "usual": (),
    "one score": ("inference.score_threshold=0.0", *PRESETS["base-only"]),
    "all cells": ("detector.decoder.queries=9999",),
    "all scores": ("inference.score_threshold=0.0",),
    "an NMS all the same": ("inference.nms=0.5",),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_finds_what_the_model_finds(name: str) -> None:
    model = detector(*SETTINGS[name]).eval()
    same(model, ExportableDetector(model))


@pytest.mark.parametrize("name", ["usual", "all cells", "all scores"])
@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT])
def test_a_trace_keeps_what_a_picture_decides(form: ModelForm, name: str, tmp_path: Path) -> None:
    """Traced on a picture of none of the sizes."""
    model = detector(*SETTINGS[name]).eval()
    same(model, written(form, model, tmp_path / "out"))


def each(model: RTDETR, run: Run) -> None:
    """What it finds in batches of pictures of one size is what the model finds in each."""
    least = model.recipe.inference.score_threshold
    for number, size in enumerate(SIZES):
        for classes in (0, 1, 9, 300):
            batch = torch.stack(pictures(*[size] * (number + 1), first=size[0]))
            texts, is_novel = unit(classes, DIM, seed=classes), torch.arange(classes) % 3 == 0
            with torch.inference_mode():
                boxes, scores, labels = run(batch, texts, is_novel)
            assert len(boxes) == len(scores) == len(labels) == number + 1
            assert not ((scores > 0) & (scores <= least)).any()
            for row, picture in enumerate(batch):
                expected = detect(model.predict([picture], texts)[0], is_novel, model.recipe.inference)
                some = scores[row] > 0
                found = Detections(boxes[row, some], scores[row, some], labels[row, some])
                require_alike(found, expected, pixels=1e-3, score=5e-4)


@pytest.mark.parametrize("name", ["usual", "one score", "all cells"])
def test_a_batch(name: str, tmp_path: Path) -> None:
    model = detector(*SETTINGS[name]).eval()
    each(model, ExportableDetector(model))
    example = torch.stack(pictures((90, 120), (90, 120))).contiguous(), unit(4, DIM, seed=1), torch.arange(4) > 2
    for form in (ModelForm.ONNX, ModelForm.TORCHSCRIPT):
        write(form, model, example, dict.fromkeys(CARRIED, ""), tmp_path / "out")
        each(model, open_model(form, tmp_path / "out")[0])


def test_an_onnx_file_has_no_nms_and_no_operators_of_its_own(tmp_path: Path) -> None:
    import onnx

    written(ModelForm.ONNX, detector().eval(), tmp_path / "out")
    nodes = onnx.load(tmp_path / "out").graph.node
    assert {node.domain for node in nodes} == {""}
    kinds = {node.op_type for node in nodes}
    assert "GridSample" in kinds
    assert not kinds & {"NonMaxSuppression", "Loop", "If"}
