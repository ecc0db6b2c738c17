"""The optimiser in one pass over memory, and the numbers that a step is calculated in."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from orders import InOrder
from torch import Tensor, nn

from hdovd.config.recipe import Recipe
from hdovd.pipelines.common.device import training_products
from hdovd.pipelines.dataloading.loader import Dealing, TrainingBatches
from hdovd.pipelines.training.loop import Loop, build_optimizer

CPU = torch.device("cpu")
Optimizer = torch.optim.Optimizer


@pytest.fixture(params=["sgd", "adamw"])
def build(
    request: pytest.FixtureRequest, micro_recipe: Callable[..., Recipe]
) -> Callable[[], tuple[nn.Module, Optimizer]]:
    """A small model and its optimiser, the same each time."""
    config = micro_recipe(f"train.optimizer={request.param}", "train.lr=0.02", "train.weight_decay=0.01").train

    def build() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Linear(37, 65))
        return model, build_optimizer(model, config)

    return build


def _plain(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """torch's form of several passes, with the same values."""
    group = {
        name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "fused", "foreach")
    }
    names = {"lr", "weight_decay"} | ({"momentum"} if isinstance(optimizer, torch.optim.SGD) else {"betas", "eps"})
    return type(optimizer)(model.parameters(), fused=False, foreach=False, **{name: group[name] for name in names})  # type: ignore[call-arg]


def _steps(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> list[Tensor]:
    for step in range(first, last):
        draws = torch.Generator().manual_seed(step)
        for value in model.parameters():
            value.grad = torch.randn(value.shape, generator=draws)
        optimizer.step()
    return [value.detach().clone() for value in model.parameters()]


def test_it_is_fused_and_gives_what_torch_gives_in_several_passes(
    build: Callable[[], tuple[nn.Module, Optimizer]],
) -> None:
    (model, optimizer), (other, _) = build(), build()
    assert [group["fused"] for group in optimizer.param_groups] == [True]
    plain = _plain(optimizer, other)
    begun = [value.detach().clone() for value in model.parameters()]
    for found, wanted, start in zip(_steps(model, optimizer, 0, 50), _steps(other, plain, 0, 50), begun, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)  # float32's rounding over 50 steps of up to 0.2
        assert (wanted - start).abs().max() > 0.1


def test_the_state_of_a_run_of_before_goes_on_in_several_passes(
    build: Callable[[], tuple[nn.Module, Optimizer]],
) -> None:
    """To the bit, as it began."""
    (model, optimizer), (other, fused) = build(), build()
    plain = _plain(fused, other)
    _steps(other, plain, 0, 5)
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(deepcopy(plain.state_dict()))
    assert not optimizer.param_groups[0]["fused"]
    for found, wanted in zip(_steps(model, optimizer, 5, 20), _steps(other, plain, 5, 20), strict=True):
        assert torch.equal(found, wanted)


def test_a_gpus_products_are_tf32_in_training_alone() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with training_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
    with training_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_step_asks_for_them_and_leaves_the_process_as_it_was(
    micro_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a step that fails."""
    found: list[str] = []
    model = nn.Linear(3, 1)

    def losses_of(rows: list[Tensor], _: int) -> dict[str, Tensor]:
        found.append(torch.get_float32_matmul_precision())
        if len(found) == 2:
            raise ValueError("no loss")
        return {"square": model(torch.stack(rows)).square().mean()}

    batches = TrainingBatches([*torch.randn(8, 3)], Dealing(InOrder(8), 8), 0, device=CPU)  # type: ignore[arg-type]
    loop = Loop(model, losses_of, batches, micro_recipe("train.ema=0.5").train, CPU, "train", lambda row: 0)
    loop.device = torch.device("cuda")  # which nothing here is put on
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    loop.take_step([*torch.randn(8, 3)], 0)
    with pytest.raises(ValueError, match="no loss"):
        loop.take_step([*torch.randn(8, 3)], 0)
    assert found == ["high", "high"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_leaves_alone_what_a_detector_names(name: str, micro_recipe: Callable[..., Recipe]) -> None:
    """Without a gradient nothing but decay moves a weight."""
    config = micro_recipe(f"train.optimizer={name}", "train.lr=0.1", "train.weight_decay=0.5").train
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    begun = {key: value.detach().clone().fill_(1.0) for key, value in model.state_dict().items()}
    model.load_state_dict(begun)
    model.undecayed = ("1.*", "*.bias")  # type: ignore[assignment]
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    build_optimizer(model, config).step()
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, begun[key])} == {"0.weight"}
