"""The wide layer's own products against `nn.Linear`'s: values, gradients, state, and where it must not use them."""

import copy

import pytest
import torch
from torch import nn

from hdovd.modeling.adamixer import wide_linear
from hdovd.modeling.adamixer.wide_linear import WideLinear


def pair() -> tuple[WideLinear, nn.Linear]:
    torch.manual_seed(0)
    wide, plain = WideLinear(24, 160), nn.Linear(24, 160)
    plain.load_state_dict(copy.deepcopy(wide.state_dict()), strict=True)
    return wide, plain


def products_taken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    taken: list[None] = []
    real = wide_linear._product

    def counted(*args: torch.Tensor) -> torch.Tensor:
        taken.append(None)
        return real(*args)

    monkeypatch.setattr(wide_linear, "_product", counted)
    return taken


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(rows: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = products_taken(monkeypatch)
    wide, plain = pair()
    start = torch.randn(24, rows).t() if transposed else torch.randn(rows, 24)
    factors = torch.randn(160, rows).t() if transposed else torch.randn(rows, 160)
    found = []
    for layer in (wide, plain):
        x = start.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(x)
        (out.square() * factors).sum().backward()
        found.append([out, x.grad, layer.weight.grad, layer.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(taken) == (3 if wide_linear.HAS_PRODUCT else 0)


def test_no_rows() -> None:
    wide, _ = pair()
    out = wide(torch.zeros(0, 24))
    out.sum().backward()
    assert out.shape == (0, 160)
    torch.testing.assert_close(wide.weight.grad, torch.zeros(160, 24))


def test_without_gradients_in_other_precisions_and_in_autocast_it_is_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = products_taken(monkeypatch)
    wide, plain = pair()
    x = torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(wide(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide(x).dtype == torch.bfloat16
        assert torch.equal(wide(x), plain(x))
    assert torch.equal(wide.double()(x.double()), plain.double()(x.double()))
    assert not taken


def test_where_torch_lacks_the_operator_it_is_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = products_taken(monkeypatch)
    monkeypatch.setattr(wide_linear, "HAS_PRODUCT", False)
    wide, plain = pair()
    x = torch.randn(5, 24)
    assert torch.equal(wide(x), plain(x))
    assert not taken
