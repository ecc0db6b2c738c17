"""Losses of localisation: values by hand and against plain geometry, gradients against differences, nothing at all."""

import math

import pytest
import torch
from torch import Tensor

from hdovd.modeling.losses.localisation import centerness, iou_loss, iou_of_offsets, offset_loss, quality_loss

ONE = torch.tensor(1.0)


def decode(deltas: Tensor, anchor: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """xyxy of offsets (dx, dy, dw, dh) from an anchor (centre x, centre y, width, height)."""
    dx, dy, dw, dh = map(float, deltas)
    x, y, w, h = (
        anchor[0] + dx * anchor[2],
        anchor[1] + dy * anchor[3],
        anchor[2] * math.exp(dw),
        anchor[3] * math.exp(dh),
    )
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def naive_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def naive_centerness(point: tuple[float, float], box: tuple[float, ...]) -> float:
    left, top, right, bottom = point[0] - box[0], point[1] - box[1], box[2] - point[0], box[3] - point[1]
    if min(left, top, right, bottom) <= 0:
        return 0.0
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def offsets(count: int = 40, seed: int = 3, spread: float = 0.4) -> Tensor:
    return spread * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("anchor", [(50.0, 50.0, 20.0, 20.0), (10.0, 90.0, 64.0, 8.0)])
def test_iou_of_offsets_equals_the_iou_of_the_boxes(anchor: tuple[float, float, float, float]) -> None:
    one, two = offsets(200, seed=3), offsets(200, seed=4)
    expected = [naive_iou(decode(a, anchor), decode(b, anchor)) for a, b in zip(one, two, strict=True)]
    assert min(expected) < 0.1 < 0.4 < max(expected)
    torch.testing.assert_close(iou_of_offsets(one, two), torch.tensor(expected, dtype=torch.float64))


def test_iou_of_offsets_by_hand() -> None:
    same = torch.tensor([[0.1, -0.2, 0.3, 0.0]])
    assert iou_of_offsets(same, same).item() == pytest.approx(1.0)
    zero = torch.zeros(1, 4)
    assert iou_of_offsets(zero, torch.tensor([[0.5, 0.0, 0.0, 0.0]])).item() == pytest.approx(1 / 3)
    assert iou_of_offsets(zero, torch.tensor([[0.0, 0.0, math.log(2), math.log(2)]])).item() == pytest.approx(0.25)
    assert iou_of_offsets(zero, torch.tensor([[3.0, 0.0, 0.0, 0.0]])).item() == 0.0


def test_wild_offsets_have_a_finite_iou_and_centerness() -> None:
    wild = torch.tensor([[0.0, 0.0, 200.0, 200.0], [0.0, 0.0, -200.0, 0.0], [1e3, 0.0, -200.0, 0.0]])
    assert iou_of_offsets(wild, torch.zeros(3, 4)).isfinite().all()
    assert centerness(wild).isfinite().all()


@pytest.mark.parametrize("anchor", [(50.0, 50.0, 20.0, 20.0), (10.0, 90.0, 64.0, 8.0)])
def test_centerness_equals_that_of_the_distances(anchor: tuple[float, float, float, float]) -> None:
    boxes = offsets(60)
    expected = [naive_centerness(anchor[:2], decode(box, anchor)) for box in boxes]
    assert expected.count(0.0) > 3  # centres outside of their box
    assert max(expected) > 0.7
    torch.testing.assert_close(centerness(boxes), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), 1.0),  # the anchor itself
        ((0.0, 0.0, 2.0, -1.0), 1.0),  # any size about the same centre
        ((0.25, 0.0, 0.0, 0.0), math.sqrt(1 / 3)),  # l, r = 0.25, 0.75 sides
        ((0.25, -0.25, 0.0, 0.0), 1 / 3),
        ((0.5, 0.0, 0.0, 0.0), 0.0),  # on the edge
        ((0.5, 0.0, math.log(2), 0.0), math.sqrt(1 / 3)),
        ((0.7, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_centerness_by_hand(box: tuple[float, ...], expected: float) -> None:
    assert centerness(torch.tensor([box], dtype=torch.float64)).item() == pytest.approx(expected)


def test_losses_by_hand() -> None:
    zero = torch.zeros(2, 4)
    third = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # IoU 1/3 and 1
    assert iou_loss(third, zero, torch.tensor(4.0)).item() == pytest.approx((2 / 3) / 4)
    assert offset_loss(third, torch.full((2, 4), 0.25), torch.tensor(2.0)).item() == pytest.approx(8 * 0.25 / 2)
    logits = torch.tensor([0.0, math.log(3)])  # 0.5 and 0.75
    assert quality_loss(logits, torch.tensor([0.9, 0.5]), torch.tensor(2.0)).item() == pytest.approx((0.4 + 0.25) / 2)


def test_a_perfect_prediction_costs_nothing() -> None:
    boxes, quality = (
        offsets(),
        torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.98 + 0.01,
    )
    assert iou_loss(boxes, boxes, ONE).item() == pytest.approx(0.0, abs=1e-9)
    assert offset_loss(boxes, boxes, ONE).item() == 0.0
    assert quality_loss(quality.logit(), quality, ONE).item() == pytest.approx(0.0, abs=1e-9)


def test_gradients_equal_differences() -> None:
    predicted, wanted = (offsets(12, seed, 0.15).requires_grad_(seed == 5) for seed in (5, 6))
    logits, quality = offsets(3, 7, 1.0).flatten().requires_grad_(), torch.full((12,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: iou_loss(p, wanted, ONE), (predicted,))
    assert torch.autograd.gradcheck(lambda p: offset_loss(p, wanted, ONE), (predicted,))
    assert torch.autograd.gradcheck(lambda p: quality_loss(p, quality, ONE), (logits,))


def test_a_step_down_the_iou_loss_brings_boxes_nearer() -> None:
    predicted, wanted = offsets(20, 8, 0.2).requires_grad_(), offsets(20, 9, 0.2)
    iou_loss(predicted, wanted, ONE).backward()
    assert predicted.grad is not None
    nearer = iou_of_offsets(predicted.detach() - 0.001 * predicted.grad, wanted) - iou_of_offsets(
        predicted.detach(), wanted
    )
    assert (nearer > 0).all()


def test_no_box_at_all_is_zero_with_backward() -> None:
    boxes, logits = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, requires_grad=True)
    total = (
        iou_loss(boxes, boxes.detach(), ONE)
        + offset_loss(boxes, boxes.detach(), ONE)
        + quality_loss(logits, logits.detach(), ONE)
    )
    total.backward()
    assert total.item() == 0.0
    assert boxes.grad is not None
    assert logits.grad is not None
