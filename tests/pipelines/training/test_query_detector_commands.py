"""Detectors made of queries through the stages that Faster R-CNN goes through: train, resume, eval, detect, relations,
report, export, ablate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import adamixer_micro
import pytest
import rtdetr_micro
import torch
from safetensors.torch import load_file
from torch import Tensor

from hdovd.config.recipe import PRESETS
from hdovd.core import HdovdError, Stopped
from hdovd.data import DataPaths
from hdovd.modeling.base import Detector, build_detector
from hdovd.pipelines.ablation.grid import cells_of
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import ExportModelConfig, check, export_model, made_up_pictures, open_model
from hdovd.pipelines.report.figures import LEVELS
from hdovd.pipelines.report.report import relations
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import PLAIN, RunHooks, load_checkpoint
from hdovd.pipelines.training.loop import Loop
from hdovd.pipelines.training.train import TrainConfig, train


@pytest.fixture(scope="module", params=[adamixer_micro, rtdetr_micro], ids=["adamixer", "rtdetr"])
def micro(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(scope="module")
def job(micro: ModuleType, world: Path, training_cache: Path) -> Callable[..., TrainConfig]:
    def make(out: Path, *settings: str, **changes: Any) -> TrainConfig:
        return replace(
            TrainConfig(
                data=DataPaths(world),
                cache=training_cache,
                out=out,
                recipe=micro.recipe(*settings),
                protocol=str(world / "protocol.toml"),
                device="cpu",
            ),
            **changes,
        )

    return make


Job = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def run(job: Job, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(job(tmp_path_factory.mktemp("ada") / "run"))


def losses_of(run: RunFolder) -> list[dict[str, float]]:
    return [{k: v for k, v in e.items() if k not in PLAIN and not k.startswith("val_")} for e in run.entries()]


def test_distillation_begins_with_its_epoch(run: RunFolder) -> None:
    first, second = losses_of(run)
    assert first.keys() == second.keys()
    distilled = {name for name in first if name.partition("_")[0] in ("instance", "text", "image")}
    assert len(distilled) == 5
    assert all(first[name] == 0 <= second[name] for name in distilled)
    assert all(
        second[name] > 0 for name in ("text_alignment", "text_relation", "image_alignment")
    )  # no query is near a box yet
    assert all(first[name] > 0 for name in first.keys() - distilled)


def test_every_loss_has_its_place_in_a_report(run: RunFolder) -> None:
    assert {name.partition("_")[0] for name in losses_of(run)[0]} <= LEVELS.keys()


def test_it_goes_on_in_the_middle_of_its_second_epoch(
    run: RunFolder, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told its epoch again, it ends as if it had never stopped."""
    step = RunHooks.step

    def stop(self: RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == 3:  # of 4
            self.stop.signals.append(15)
        step(self, loop)

    with monkeypatch.context() as patch:
        patch.setattr(RunHooks, "step", stop)
        with pytest.raises(Stopped):
            train(job(tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run")
    assert state is not None
    assert state["step"] == 3
    again = train(job(tmp_path / "run", resume=True))
    torch.testing.assert_close(
        load_file(again.path / "model.safetensors"), load_file(run.path / "model.safetensors"), rtol=0, atol=0
    )


def test_it_is_evaluated(run: RunFolder, world: Path) -> None:
    result = evaluate(EvalConfig(run=run.path, data=DataPaths(world), device="cpu"))
    assert (result.alpha, result.beta) == (0.35, 0.65)
    assert json.loads((run.path / "detections.json").read_text())


def test_relations(run: RunFolder, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs of no IoU there is nothing to compare; with pairs of any IoU there are matrices."""
    training = DataPaths(world).load("train2017", run.protocol(), base_only=True)
    from hdovd.modeling.queries import pairs

    monkeypatch.setattr(pairs, "STUDENT_IOU", 1.0)
    with pytest.raises(HdovdError, match=r"no box .* has a student embedding"):
        relations(run, training, 4)
    monkeypatch.setattr(pairs, "STUDENT_IOU", -1.0)
    found = relations(run, training, 4)
    assert found.student.shape == found.teacher.shape == (len(found.names),) * 2
    assert len(found.names) > 1


@pytest.mark.parametrize("form", ModelForm)
def test_every_form_finds_what_the_model_finds(form: ModelForm, run: RunFolder, tmp_path: Path) -> None:
    done = export_model(ExportModelConfig(run=run.path, form=form, out=tmp_path / "out"))
    assert done.detections > 0
    assert done.difference < 5e-4


@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT])
def test_a_file_that_takes_batches(form: ModelForm, run: RunFolder, tmp_path: Path) -> None:
    """Of a detector without NMS. A file that mixes its pictures up is none."""
    job = ExportModelConfig(run=run.path, form=form, out=tmp_path / "out", batch=True)
    recipe = run.recipe()
    if recipe.inference.nms < 1:
        with pytest.raises(HdovdError, match=rf"--batch: detector {recipe.detector.name} .* one picture at a time"):
            export_model(job)
        return
    done = export_model(job)
    assert done.detections > 0
    assert done.difference < 5e-4
    opened, carried = open_model(form, tmp_path / "out")
    assert "(pictures, 3, height, width)" in carried["about"]

    def mixed_up(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return opened(given[0].flip(0), *given[1:])

    model, texts = build_detector(recipe, 24, initialise=False), run.class_embeddings().float()
    run.load_model(model)
    picture = made_up_pictures(recipe.input)[:1]
    assert check(opened, model, texts, torch.arange(len(texts)) < 2, picture, True).difference < 5e-4
    assert check(mixed_up, model, texts, torch.arange(len(texts)) < 2, picture, True).difference > 1e-2


def test_weights_alone_take_no_option_for_batches(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"--batch: a \.safetensors file holds weights alone"):
        export_model(
            ExportModelConfig(run=run.path, form=ModelForm.SAFETENSORS, out=tmp_path / "out.safetensors", batch=True)
        )


def test_exported_weights_leave_training_out(run: RunFolder, tmp_path: Path) -> None:
    export_model(ExportModelConfig(run=run.path, form=ModelForm.SAFETENSORS, out=tmp_path / "out"))
    names = load_file(tmp_path / "out").keys()
    assert "background" in names
    assert not [name for name in names if name.startswith(build_detector(run.recipe(), 24).training_parts)]


@pytest.mark.parametrize("form", [ModelForm.ONNX, ModelForm.TORCHSCRIPT])
def test_a_detector_that_cannot_be_traced_says_which_form_works(
    form: ModelForm, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(build_detector(run.recipe(), 24)), "exportable", None)
    with pytest.raises(HdovdError, match=rf"--format {form}: .*{run.recipe().detector.name}.*--format safetensors"):
        export_model(ExportModelConfig(run=run.path, form=form, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    done = export_model(ExportModelConfig(run=run.path, form=ModelForm.SAFETENSORS, out=tmp_path / "out"))
    assert done.difference < 1e-5


def test_a_grid_over_its_values(micro: ModuleType) -> None:
    others = [setting for setting in micro.SETTINGS if "stages" not in setting]
    cells = cells_of(micro.NAME, others, ["detector.decoder.stages=1,2", "loss.instance.enabled=true,false"])
    assert [cell.values["detector.decoder.stages"] for cell in cells] == [1, 1, 2, 2]


def test_base_only_trains_the_detector_alone(job: Job, tmp_path: Path) -> None:
    run = train(job(tmp_path / "run", *PRESETS["base-only"], "train.epochs=1"))
    assert {name.partition("_")[0] for name in losses_of(run)[0]} == {
        *({"rpn"} if run.recipe().detector.name == "adamixer" else {"selection", "denoising"}),
        "classification",
        "objectness",
        "box",
        "giou",
    }


def test_adamw_decays_all_weights_alike(micro: ModuleType) -> None:
    from hdovd.pipelines.training.loop import build_optimizer

    model: Detector = build_detector(micro.recipe("train.weight_decay=0.25"), 24)
    groups = build_optimizer(model, model.recipe.train).param_groups
    assert [group["weight_decay"] for group in groups] == [0.25]
    assert sum(p.numel() for p in groups[0]["params"]) == sum(p.numel() for p in model.parameters())
