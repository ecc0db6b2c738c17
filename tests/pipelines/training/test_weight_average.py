"""The moving average of weights, `train.ema`: its values, and what of a run is averaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.base import build_detector
from hdovd.modeling.distributed import FeatureQueue
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.pipelines.evaluation.evaluate import EvalConfig, evaluate
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.hooks import load_checkpoint
from hdovd.pipelines.training.loop import WeightAverage
from hdovd.pipelines.training.train import TrainConfig, train

TrainMicro = Callable[..., RunFolder]


class _Small(nn.Module):
    """Trained and frozen weights, a batch norm, a memory."""

    training_parts = ("memory.",)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1), requires_grad=False)
        self.norm, self.memory = nn.BatchNorm1d(1), FeatureQueue(4, 2)

    def move(self, step: int) -> None:
        with torch.no_grad():
            self.weight += step
            self.norm.running_mean.fill_(float(step))
            self.norm.num_batches_tracked += 1
        self.memory.push(torch.full((1, 2), float(step)))


def test_values_are_those_of_the_formula() -> None:
    small = _Small()
    average = WeightAverage(small, 0.3)
    weight = mean = 0.0
    for step in range(1, 13):
        small.move(step)
        average.update()
        decay = min(0.3, (step - 1) / (step + 8))
        weight = decay * weight + (1 - decay) * small.weight[0].item()
        mean = decay * mean + (1 - decay) * step
    assert (12 - 1) / (12 + 8) > 0.3 > (2 - 1) / (2 + 8)  # the warm-up ended on the way
    found = average.model
    assert isinstance(found, _Small)
    torch.testing.assert_close(found.weight, torch.full((2,), weight))
    torch.testing.assert_close(found.norm.running_mean, torch.tensor([mean]))
    assert abs(weight - small.weight[0].item()) > 1
    assert found.norm.num_batches_tracked == 12
    assert torch.equal(found.frozen, small.frozen)
    assert torch.equal(found.memory.read(), torch.tensor([[12.0, 12], [11, 11], [10, 10], [9, 9]]))
    assert not any(value.requires_grad for value in found.parameters())


def test_it_is_kept_in_float32() -> None:
    """A step of a 16-bit weight may be below its resolution."""
    small = nn.Linear(1, 1, dtype=torch.bfloat16)
    nn.init.ones_(small.weight)
    average = WeightAverage(small, 0.5)
    average.update()
    small.weight.data.add_(2**-7)  # of bfloat16 the smallest above one
    average.update()
    assert average.model.weight.dtype is torch.float32
    assert 1 < float(average.model.weight) < 1 + 2**-7


def test_a_state_goes_on() -> None:
    one, two = (_Small() for _ in range(2))
    whole, resumed = WeightAverage(one, 0.9), WeightAverage(two, 0.9)
    for step in range(4):
        one.move(step)
        whole.update()
    two.load_state_dict(one.state_dict())
    resumed.load(whole.state())
    for small, average in ((one, whole), (two, resumed)):
        small.move(5)
        average.update()
    found, wanted = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_memories_that_grow_and_what_a_model_learns_of_objects_are_taken_over() -> None:
    """AdaMixer's moving means have no rows before its first step, and its text of "object" may come with that step."""
    model = build_detector(load_recipe("demo-adamixer"), 8)
    assert isinstance(model, AdaMixer)
    average = WeightAverage(model, 0.9)
    assert model.text_level is not None
    model.text_level.centroids = torch.randn(len(model.text_level.centroids), 5, 8)
    model.set_object_text(torch.randn(8))
    average.update()
    found = average.model
    assert isinstance(found, AdaMixer)
    assert found.knows_objects
    assert all(
        torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items()
    )  # the first is a copy


@pytest.fixture(scope="module")
def run(
    world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    recipe = micro_recipe("train.ema=0.95", "train.epochs=2", "train.batch_size=4")
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path_factory.mktemp("ema") / "run",
        recipe=recipe,
        protocol=str(world / "protocol.toml"),
        device="cpu",
        validation=DataPaths(world),
    )
    return train(job)


def _differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, two[name])}


def test_a_run_keeps_the_averaged_weights_and_goes_on_with_the_others(run: RunFolder) -> None:
    kept, state = load_file(run.path / "model.safetensors"), load_checkpoint(run.path)
    assert state is not None
    assert state["ema"]["updates"] == 10
    assert all(torch.equal(kept[name], value) for name, value in state["ema"]["weights"].items())
    averaged = _differ(kept, state["model"])
    assert {"head.fc1.weight", "backbone.body.bn1.running_mean"} <= averaged <= state["ema"]["weights"].keys()
    assert kept["instance_level.student_queue.rows"].any()


def test_it_is_the_averaged_weights_that_are_validated(run: RunFolder, world: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run.path, tmp_path / "run"))
    told = [entry for entry in run.entries() if "val_all" in entry][-1]
    found = evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", batch_size=4)).combined
    assert {f"val_{group}": value for group, value in found.summary()["ap50"].items()} == {
        name: value for name, value in told.items() if name.startswith("val_")
    }
    state = load_checkpoint(out)
    assert state is not None
    model = FasterRCNN(run.recipe(), run.class_embeddings().shape[1], initialise=False)
    model.load_state_dict(state["model"])
    RunFolder(out).save_model(model)  # others would have another AP
    assert (
        evaluate(EvalConfig(run=out, data=DataPaths(world), device="cpu", batch_size=4)).combined.summary()
        != found.summary()
    )


def test_another_average_is_no_resumption(
    run: RunFolder, world: Path, training_cache: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    out = Path(shutil.copytree(run.path, tmp_path / "run"))
    recipe = micro_recipe("train.epochs=2", "train.batch_size=4")
    with pytest.raises(HdovdError, match=r"recipe\.train\.ema differs: asked for 0\.0, began with 0\.95"):
        train(
            TrainConfig(
                data=DataPaths(world),
                cache=training_cache,
                out=out,
                recipe=recipe,
                protocol=str(world / "protocol.toml"),
                device="cpu",
                resume=True,
            )
        )


def test_texts_of_backgrounds_are_not_averaged() -> None:
    """They never change, and averages of before there were any go on."""
    model = nn.Linear(2, 2)
    before = WeightAverage(model, 0.9).state()
    model.register_buffer("background_texts", torch.ones(3, 2))
    average = WeightAverage(model, 0.9)
    average.load(before)
    assert torch.equal(average.model.background_texts, model.background_texts)  # type: ignore[arg-type]
