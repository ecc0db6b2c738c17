"""The AdaMixer that can be traced finds what `predict` and `detect` find; so does a trace of it, in pictures of other
sizes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adamixer_scenes import DIM, detector, pictures, unit
from detections_alike import require_alike

from hdovd.config.recipe import PRESETS
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.boxes import Detections, detect
from hdovd.modeling.export.detectors import ExportableDetector
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import CARRIED, Run, open_model, write

SIZES = [(96, 80), (37, 91), (300, 40), (7, 5), (64, 64)]  # height, width


def written(form: ModelForm, model: AdaMixer, file: Path) -> Run:
    example = (pictures((90, 120))[0].contiguous(), unit(4, DIM, seed=1), torch.tensor([True, False, False, True]))
    write(form, model, example, dict.fromkeys(CARRIED, ""), file)
    return open_model(form, file)[0]


def same(model: AdaMixer, run: Run) -> None:
    for size in SIZES:
        for classes in (1, 9):
            picture, texts, is_novel = (
                pictures(size, first=size[0])[0],
                unit(classes, DIM, seed=classes),
                torch.arange(classes) % 3 == 0,
            )
            expected = detect(model.predict([picture], texts)[0], is_novel, model.recipe.inference)
            with torch.inference_mode():
                found = Detections(*run(picture, texts, is_novel))
            assert len(found.labels) > 0
            require_alike(found, expected, pixels=1e-3, score=5e-5)


@pytest.mark.parametrize(
    "settings",
    [
        (),  # more candidates than queries
        PRESETS["base-only"],  # one score
        ("detector.decoder.queries=9999",),  # fewer candidates than queries
        ("detector.proposals.pre_nms=5", "detector.decoder.queries=15"),  # those that the NMS dropped come back
        ("detector.proposals.nms=0.1",),
    ],
    ids=["usual", "one score", "all candidates", "few", "strict"],
)
def test_it_finds_what_the_model_finds(settings: tuple[str, ...]) -> None:
    model = detector(*settings).eval()
    same(model, ExportableDetector(model))


@pytest.mark.parametrize(
    "settings", [(), ("detector.proposals.pre_nms=60", "detector.decoder.queries=200")], ids=["usual", "varying"]
)
@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT])
def test_a_trace_keeps_what_a_picture_decides(form: ModelForm, settings: tuple[str, ...], tmp_path: Path) -> None:
    """Traced on a picture of none of the sizes; queries and candidates in number as the picture has them."""
    model = detector(*settings).eval()
    same(model, written(form, model, tmp_path / "out"))


@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT, None])
def test_queries_from_equal_candidates(form: ModelForm | None, tmp_path: Path) -> None:
    """As cells of the padding are: the first ones are taken, in a trace too."""
    model = detector("detector.proposals.pre_nms=100").eval()
    with torch.no_grad():
        model.proposals.main.object_scale.zero_()
    same(model, ExportableDetector(model) if form is None else written(form, model, tmp_path / "out"))
