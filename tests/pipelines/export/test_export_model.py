"""Export: files of every form, run as their users would, find what the model finds; a file that does not is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from hdovd.cli.main import app
from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import HdovdError
from hdovd.data import Protocol
from hdovd.modeling.batching import batch_images
from hdovd.modeling.boxes import Detections, detect
from hdovd.modeling.export.detectors import ExportableDetector
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.pipelines.common.images import pixels_of
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import (
    CARRIED,
    ExportModelConfig,
    export_model,
    largest_difference,
    made_up_pictures,
    open_model,
)
from hdovd.pipelines.runs import RunFolder, Weights

PAGE = Path(__file__).parents[3] / "docs" / "EXPORT.md"
EXAMPLES = {
    text.split("\n", 1)[0].removeprefix("# "): text
    for text in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
}
PROTOCOL = Protocol("pets", ("dog", "cat"), ("fish",), 32, (100, 300, 1000))
DIM = 24


def _random_run(folder: Path, recipe: Recipe) -> RunFolder:
    """A run that was never trained."""
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(3, DIM), dim=1)
    made = {"clip": {"weights_sha256": "ab" * 32}, "templates": ["a {}"], "names": PROTOCOL.names}
    run = RunFolder.create(
        folder, recipe, PROTOCOL, texts, {"cache": {"levels": {"class": {"key": "k", "inputs": made}}}}
    )
    run.save_model(FasterRCNN(recipe, DIM))
    return run


def _model(run: RunFolder, weights: Weights = Weights.LAST) -> FasterRCNN:
    model = FasterRCNN(run.recipe(), run.class_embeddings().shape[1], initialise=False)
    run.load_model(model, weights.file)
    return model.eval()


def _pictures(world: Path) -> list[Tensor]:
    """Some as they are, some of other sizes."""
    opened = [Image.open(file).convert("RGB") for file in sorted((world / "val2017").iterdir())[:4]]
    return [
        pixels_of(p)
        for p in (opened[0], opened[1].resize((61, 203)), opened[2].resize((400, 90)), opened[3].resize((20, 20)))
    ]


def _export(run: RunFolder, form: ModelForm, out: Path, **more: object) -> Path:
    export_model(ExportModelConfig(run=run.path, form=form, out=out, **more))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("distilled", form) for form in ModelForm), ("base_only", ModelForm.ONNX), ("base_only", ModelForm.TORCHSCRIPT)],
)
def test_every_form_finds_what_the_model_finds(
    form: ModelForm, name: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trained: RunFolder = request.getfixturevalue(name)
    run, _ = open_model(form, _export(trained, form, tmp_path / "detector"))
    model, config = _model(trained), trained.recipe().inference
    generator, count = torch.Generator().manual_seed(0), 0
    with torch.inference_mode():
        for picture in _pictures(world):
            for classes in (1, 24, 200):
                texts = torch.randn(classes, DIM, generator=generator)
                is_novel = torch.arange(classes) % 3 == 0
                expected = detect(model.predict([picture], texts)[0], is_novel, config)
                found = Detections(*run(picture, texts, is_novel))
                assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (
                    torch.float32,
                    torch.float32,
                    torch.int64,
                )
                assert largest_difference(expected, found, config) < 1e-3
                assert abs(len(found.scores) - len(expected.scores)) <= 1
                count += len(expected.scores)
    assert count > 500


def test_a_photo_is_resized_as_the_model_does_it(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> None:
    """To the bit where torch adds alike: boxes of large pictures are off by whatever the resizing is."""
    trained = _random_run(tmp_path / "run", micro_recipe())
    detector, config = ExportableDetector(_model(trained)), trained.recipe().input
    generator = torch.Generator().manual_seed(0)
    for size in ((1000, 1500), (1125, 1500), (3000, 400), (7, 5), (config.short_side, config.short_side), (1, 900)):
        picture = torch.randint(0, 256, (3, *size), generator=generator).byte()
        expected, factors = batch_images([picture], config)
        batch, factor = detector.prepare(picture[None])
        torch.testing.assert_close(batch.tensors.contiguous(), expected.tensors.contiguous(), atol=2e-6, rtol=0)
        assert factor.flip(0).tolist() == pytest.approx(factors[0], abs=0)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_onnx_resizes_a_photo_as_the_model_does_it(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> None:
    class Prepared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = ExportableDetector(_model(_random_run(tmp_path / "run", micro_recipe())))

        def forward(self, image: Tensor) -> Tensor:
            return self.detector.prepare(image[None])[0].tensors[0]

    module, picture = (
        Prepared(),
        torch.randint(0, 256, (3, 1000, 1500), generator=torch.Generator().manual_seed(0)).byte(),
    )
    torch.onnx.export(
        module,
        (picture[:, :90, :120],),
        str(tmp_path / "x.onnx"),
        input_names=["image"],
        output_names=["pixels"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
        opset_version=17,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": picture.numpy()})
    np.testing.assert_allclose(found, module(picture).numpy(), atol=2e-6)


def test_a_check_on_a_photo(distilled: RunFolder, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    job = ExportModelConfig(
        run=distilled.path, form=ModelForm.ONNX, out=tmp_path / "x.onnx", check_images=(tmp_path / "noise.png",)
    )
    done = export_model(job)
    assert done.pictures == 4
    assert done.difference <= 2e-4


def test_a_picture_without_detections(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> None:
    trained = _random_run(tmp_path / "run", micro_recipe("inference.score_threshold=1.0"))
    run, _ = open_model(ModelForm.ONNX, _export(trained, ModelForm.ONNX, tmp_path / "detector"))
    boxes, scores, labels = run(
        made_up_pictures(trained.recipe().input)[0], trained.class_embeddings(), torch.tensor([False, False, True])
    )
    assert (boxes.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,))


def test_best_weights(tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> None:
    run = _random_run(tmp_path / "run", micro_recipe())
    with pytest.raises(HdovdError, match=r"no best\.safetensors"):
        _export(run, ModelForm.SAFETENSORS, tmp_path / "best", weights=Weights.BEST)
    torch.manual_seed(1)
    run.save_model(FasterRCNN(run.recipe(), DIM), "best.safetensors")
    for weights in Weights:
        file, state = (
            _export(run, ModelForm.SAFETENSORS, tmp_path / weights.value, weights=weights),
            _model(run, weights).state_dict(),
        )
        exported = load_file(file)
        assert {"background", "head.distillation.weight"} <= exported.keys()
        assert all(torch.equal(value, state[key]) for key, value in exported.items())
        assert open_model(ModelForm.SAFETENSORS, file)[1]["weights"] == weights.value


def test_safetensors_leave_training_out(distilled: RunFolder, tmp_path: Path) -> None:
    names = {name.split(".")[0] for name in load_file(_export(distilled, ModelForm.SAFETENSORS, tmp_path / "detector"))}
    assert names == {"backbone", "rpn", "head", "background", "background_texts"}


@pytest.mark.parametrize("form", ModelForm)
def test_what_a_file_carries(form: ModelForm, tmp_path: Path, micro_recipe: Callable[..., Recipe]) -> None:
    run = _random_run(tmp_path / "run", micro_recipe())
    _, carried = open_model(form, _export(run, form, tmp_path / "detector"))
    assert CARRIED.keys() <= carried.keys()
    assert json.loads(carried["class_names"]) == ["dog", "cat", "fish"]
    assert json.loads(carried["is_novel"]) == [False, False, True]
    embeddings = np.frombuffer(base64.b64decode(carried["class_embeddings"]), "<f4").reshape(
        3, int(carried["embedding_size"])
    )
    np.testing.assert_array_equal(embeddings, run.class_embeddings().numpy())
    assert json.loads(carried["clip"]) == {"weights_sha256": "ab" * 32}
    assert json.loads(carried["templates"]) == ["a {}"]
    assert (carried["protocol"], carried["weights"], carried["recipe"]) == ("pets", "last", run.recipe().to_toml())
    assert all(name in PAGE.read_text() for name in CARRIED)


@pytest.mark.parametrize(
    ("example", "form", "never"),
    [
        ("detect_onnx.py", ModelForm.ONNX, ("torch", "hdovd")),
        ("detect_torchscript.py", ModelForm.TORCHSCRIPT, ("hdovd",)),
    ],
)
def test_the_examples_of_the_page(
    example: str,
    form: ModelForm,
    never: tuple[str, ...],
    distilled: RunFolder,
    world: Path,
    tmp_path: Path,
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    picture = sorted((world / "val2017").iterdir())[0]
    file = _export(distilled, form, tmp_path / "detector", check_images=(picture,))
    (tmp_path / example).write_text(EXAMPLES[example] + f"\nassert not set({never!r}) & set(sys.modules)\n")
    done = python([tmp_path / example, file, picture], tmp_path)
    assert done.returncode == 0, done.stderr
    names = distilled.protocol().names
    is_novel = torch.arange(len(names)) >= len(distilled.protocol().base)
    expected = detect(
        _model(distilled).predict([pixels_of(Image.open(picture).convert("RGB"))], distilled.class_embeddings())[0],
        is_novel,
        distilled.recipe().inference,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected.scores) > 0
    for line, score in zip(lines, expected.scores.tolist(), strict=True):
        name, shown, *box = line.rsplit(maxsplit=5)
        assert name in names
        assert float(shown) == pytest.approx(score, abs=2e-3)
        assert len(box) == 4


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("timm:regnety_002", ("detector.head.sampling_ratio=0",)),
        ("torchvision:mobilenet_v3_small", PRESETS["base-only"]),
    ],
)
def test_other_backbones(
    backbone: str, settings: tuple[str, ...], tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    run = _random_run(
        tmp_path / "run", micro_recipe(f"detector.backbone.name={backbone}", "detector.backbone.norm=batch", *settings)
    )
    done = export_model(ExportModelConfig(run=run.path, form=ModelForm.ONNX, out=tmp_path / "detector.onnx"))
    assert (tmp_path / "detector.onnx").stat().st_size > 1e6
    assert done.detections > 20
    assert done.difference <= 1e-3


BY_SHAPE = """
import torch

class Body(torch.nn.Module):
    channels = [8, 8, 8]

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, pixels):
        maps = self.first(pixels)
        if pixels.shape[2] > pixels.shape[3]:
            maps = maps * 3 + 1
        return [torch.nn.functional.avg_pool2d(maps, s) for s in (8, 16, 32)]

def build(levels):
    return Body()
"""


@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT])
def test_a_file_that_finds_something_else_is_refused(
    form: ModelForm, tmp_path: Path, micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a backbone that decides by the picture's shape in Python, which a trace takes for a constant."""
    (tmp_path / "by_shape.py").write_text(BY_SHAPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "by_shape", raising=False)
    run = _random_run(
        tmp_path / "run", micro_recipe("detector.backbone.name=by_shape:build", "detector.backbone.norm=batch")
    )
    out = tmp_path / "detector"
    out.write_text("of before")
    with pytest.raises(
        HdovdError,
        match=r"detector was not written: run as \w+, the detector with backbone by_shape:build differs .* by ",
    ):
        _export(run, form, out)
    assert out.read_text() == "of before"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    assert _export(run, ModelForm.SAFETENSORS, out) == out  # weights alone are none the worse


def test_without_the_extra(distilled: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(HdovdError, match=r"onnx and onnxruntime: pip install 'hdovd\[export\]'"):
        _export(distilled, ModelForm.ONNX, tmp_path / "detector.onnx")
    assert not (tmp_path / "detector.onnx").exists()


def test_the_command(distilled: RunFolder, world: Path, tmp_path: Path) -> None:
    def invoke(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["export", *map(str, words)])
        return done.exit_code, f"{done.output}{done.exception}"

    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    picture = sorted((world / "val2017").iterdir())[0]
    code, output = invoke(run, "--out", tmp_path / "detector.onnx", "--check-image", picture)
    assert code == 0, output
    assert re.search(
        r"checked: \d+ detections in 4 pictures; largest difference from the model \d\.\de-0[4-9] ", output
    )
    assert (tmp_path / "detector.onnx").stat().st_mode & 0o777 == (run / "config.toml").stat().st_mode & 0o777
    before = (run / "model.safetensors").read_bytes()
    for words, message in (
        ((run, "--out", tmp_path, "--format", "onnx"), "is a folder"),
        ((run, "--out", tmp_path / "no" / "x.pt"), "there is no folder"),
        ((run, "--out", tmp_path / "x"), "give --format, or a name that ends in one of .onnx"),
        ((run, "--out", tmp_path / "x.pt", "--format", "onnx"), "is named as torchscript"),
        ((tmp_path, "--out", tmp_path / "x.pt"), "is no run"),
        ((run, "--format", "safetensors", "--out", run / "model.safetensors"), "a file of the run itself"),
        ((run, "--out", tmp_path / "x.pt", "--check-image", PAGE), "no picture of a kind that Pillow reads"),
    ):
        code, output = invoke(*words)
        assert code == 1
        assert message in output
    assert (run / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "x").exists()
