"""Steps whose images are split into micro-batches, `train.accumulate`: their gradients, losses, exchanges and
counts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from orders import InOrder
from torch import Tensor, nn

from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.modeling.base import build_detector
from hdovd.pipelines.dataloading.loader import Dealing, TrainingBatches
from hdovd.pipelines.training.loop import Hooks, Loop
from hdovd.pipelines.training.train import loop_of
from hdovd.pipelines.training.training_set import Sample, TrainingSet

CPU = torch.device("cpu")
# Nothing that a loss is divided by, and no statistic, depends on which images are together: each has 16 RoIs and 32
# anchors, all with weight, and is padded to 96 x 96 pixels.
ALIKE = ("detector.backbone.norm=frozen", "input.short_side=96", "input.long_side=96", *PRESETS["base-only"])
Build = Callable[..., Loop[Sample]]


@pytest.fixture(scope="module")
def loop(world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe]) -> Build:
    """The loop over the micro world in its order, with 8 images a step; the same weights each time."""
    protocol = load_protocol(str(world / "protocol.toml"))
    split = DataPaths(world).load("train2017", protocol, base_only=True)

    def build(*settings: str) -> Loop[Sample]:
        recipe = micro_recipe("train.optimizer=sgd", "train.clip_norm=0", *settings)
        data = TrainingSet(split, FeatureCache(training_cache), recipe)
        torch.manual_seed(0)
        model = build_detector(recipe, data.dim, initialise=False).train()
        texts = torch.from_numpy(data.class_embeddings(protocol.base))
        dealing = Dealing(InOrder(len(data)), recipe.train.batch_size, accumulate=recipe.train.accumulate)
        batches = TrainingBatches(data, dealing, 0, device=CPU)
        return loop_of(model, batches, texts, recipe, CPU)

    return build


def _batch(loop: Loop[Sample]) -> list[Sample]:
    return next(iter(loop.batches))


def _gradients(loop: Loop[Any]) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in loop.model.named_parameters() if value.grad is not None}


def _close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Float32 sums in another order."""
    assert found.keys() == wanted.keys()
    assert any(value.any() for value in found.values())
    for name, value in wanted.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-5 * scale + 1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_gradient_is_the_mean_of_the_micro_batches(loop: Build) -> None:
    """All levels: their memories hold the earlier micro-batches of the step."""
    split, plain = loop("train.accumulate=2"), loop()
    batch = _batch(plain)
    plain.optimizer.zero_grad()
    losses = [plain._losses_of(part, 0) for part in (batch[:4], batch[4:])]
    for found in losses:
        (sum(found.values(), torch.zeros(())) / 2).backward()
    split.take_step(batch, 0)
    _close(_gradients(split), _gradients(plain))
    told = split.window.means(CPU)
    assert told == pytest.approx(
        {name: (losses[0][name].item() + losses[1][name].item()) / 2 for name in told}, rel=1e-5
    )
    state, other = split.model.state_dict(), plain.model.state_dict()
    rows = "instance_level.student_queue.rows"
    assert state[rows].any()
    torch.testing.assert_close(state[rows], other[rows])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_it_is_that_of_the_whole_batch_where_no_divisor_differs(loop: Build, parts: int) -> None:
    whole, split = loop(*ALIKE), loop(*ALIKE, f"train.accumulate={parts}")
    batch = _batch(whole)
    whole.take_step(batch, 0)
    split.take_step(batch, 0)
    _close(_gradients(split), _gradients(whole))
    assert split.window.means(CPU) == pytest.approx(whole.window.means(CPU), rel=1e-4)


class _Steps(Hooks):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.entries: list[dict[str, float]] = []

    def step(self, loop: Loop[Any]) -> None:
        self.steps.append(loop.step_number)

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        self.entries.append(entry)


def test_steps_and_images_are_counted_as_without(loop: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedule, log and hooks go by steps of the optimiser; a log entry is of all images of its steps, clipped once a
    step.
    """
    clipped: list[float] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append(norm) or clip(parameters, norm)
    )
    told = []
    for settings in ((), ("train.accumulate=4",)):
        hooks, run = _Steps(), loop("train.epochs=2", "train.batch_size=4", "train.clip_norm=1.5", *settings)
        clipped.clear()
        images: list[int] = []
        add = run.window.add
        run.window.add = lambda step, losses, ids, add=add, images=images: (images.extend(ids), add(step, losses, ids))  # type: ignore[method-assign]
        run.run(hooks)
        assert len(images) == 2 * 5 * 4
        told.append(
            (hooks.steps, [(entry["step"], entry["epoch"], entry["lr"]) for entry in hooks.entries], [*clipped], images)
        )
    assert told[0] == told[1]
    assert told[0][0] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert told[0][2] == [1.5] * 10


@pytest.fixture
def gloo() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.usefixtures("gloo")
def test_processes_exchange_gradients_once_a_step(micro_recipe: Callable[..., Recipe], parts: int) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2), gradient_as_bucket_view=True)
    exchanged: list[int] = []

    def exchange(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, which are strings here
        exchanged.append(bucket.index())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def losses_of(rows: list[Tensor], _: int) -> dict[str, Tensor]:
        return {"square": model(torch.stack(rows)).square().mean()}

    model.register_comm_hook(None, exchange)
    config = micro_recipe("train.optimizer=sgd", f"train.accumulate={parts}").train
    dealing = Dealing(InOrder(8), 8, accumulate=parts)
    batches = TrainingBatches([*torch.randn(8, 3)], dealing, 0, device=CPU)  # type: ignore[arg-type]
    run = Loop(model, losses_of, batches, config, CPU, "train", lambda row: 0)
    for step in (1, 2):
        run.take_step([*torch.randn(8, 3)], 0)
        assert exchanged == [0] * step


def test_a_batch_that_cannot_be_split_is_refused(loop: Build) -> None:
    with pytest.raises(
        HdovdError,
        match=r"a batch of 8 images cannot be parted among 1 process, in train\.accumulate = 3 micro-batches each: set "
        r"train\.batch_size.* to a multiple of 3",
    ):
        loop("train.accumulate=3")
    with pytest.raises(HdovdError, match=r"batch of 8 .*4 processes, in .*accumulate = 4 .* multiple of 16"):
        Dealing(InOrder(100), 8, 1, 4, 4)
