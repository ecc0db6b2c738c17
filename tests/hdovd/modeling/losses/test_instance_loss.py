"""Level 1 (METHOD section 4) against the equations written with loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hdovd.modeling.losses.instance import MIN_PAIRS, box_students, relation_loss


def noise(count: int, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def naive_relation(q: Tensor, e: Tensor, tau: float, temperature: float) -> float:
    total = 0.0
    for k in range(len(q)):
        p = softmax([tau * float(e[k] @ row) / temperature for row in e])
        s = softmax([tau * float(q[k] @ row) / temperature for row in q])
        total += sum(a * math.log(a / b) for a, b in zip(p, s, strict=True))
    return temperature**2 * total / len(q)


def test_two_pairs_are_the_least() -> None:
    assert MIN_PAIRS == 2


def test_students_are_means_before_they_are_normalised() -> None:
    d = torch.tensor([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    q, boxes = box_students(d, torch.tensor([2, 2, 0]), 4)
    assert boxes.tolist() == [0, 2]
    length = math.hypot(5.0, 0.5)
    torch.testing.assert_close(q, torch.tensor([[0.6, 0.8], [5.0 / length, 0.5 / length]]))


def test_students_equal_a_loop() -> None:
    d, owner = noise(20, 5), torch.randint(9, (20,), generator=torch.Generator().manual_seed(3))
    q, boxes = box_students(d, owner, 11)
    expected = [b for b in range(11) if b in owner.tolist()]
    assert boxes.tolist() == expected
    for row, box in zip(q, expected, strict=True):
        mean = sum(d[r] for r in range(20) if owner[r] == box) / sum(int(o == box) for o in owner)
        torch.testing.assert_close(row, mean / mean.norm())


def test_students_pass_the_gradient_of_the_mean() -> None:
    owner = torch.tensor([0, 2, 0, 2])
    d = noise(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: box_students(rows, owner, 3)[0], (d,))


@pytest.mark.parametrize("box_count", [0, 2])
def test_no_positive_roi_gives_no_student(box_count: int) -> None:
    d = torch.randn(0, 4, requires_grad=True)
    q, boxes = box_students(d, torch.zeros(0, dtype=torch.int64), box_count)
    assert q.shape == (0, 4)
    assert boxes.shape == (0,)
    q.sum().backward()


@pytest.mark.parametrize("n", [1, 2, 6])
def test_relation_equals_the_equation(n: int) -> None:
    q, e = normalize(noise(n, seed=1), dim=1), normalize(noise(n, seed=2), dim=1)
    assert relation_loss(q, e, 5.0, 10.0).item() == pytest.approx(naive_relation(q, e, 5.0, 10.0), abs=1e-12)
    assert relation_loss(q, e, 7.0, 2.0).item() == pytest.approx(naive_relation(q, e, 7.0, 2.0), abs=1e-12)


def test_relation_is_the_divergence_from_the_teacher() -> None:
    q, e = normalize(noise(4, seed=1), dim=1), normalize(noise(4, seed=2), dim=1)
    assert abs(relation_loss(e, q, 5.0, 1.0).item() - naive_relation(q, e, 5.0, 1.0)) > 1e-3


def test_relation_of_equals_is_zero() -> None:
    q = normalize(noise(5), dim=1).requires_grad_()
    loss = relation_loss(q, q.detach().clone(), 5.0, 10.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert q.grad is not None
    assert q.grad.abs().max().item() < 1e-12


def test_relation_ignores_a_rotation_of_the_student() -> None:
    q = normalize(noise(5), dim=1)
    rotation = torch.linalg.qr(noise(4, 4, seed=9)).Q
    assert relation_loss(q @ rotation, q, 5.0, 10.0).item() == pytest.approx(0.0, abs=1e-12)


def test_relation_gradient_is_right_and_none_goes_to_the_teacher() -> None:
    q, e = normalize(noise(4, seed=1), dim=1).requires_grad_(), normalize(noise(4, seed=2), dim=1).requires_grad_()
    fixed = e.detach()
    assert torch.autograd.gradcheck(lambda rows: relation_loss(rows, fixed, 5.0, 10.0), (q,))
    relation_loss(q, e, 5.0, 10.0).backward()
    assert e.grad is None


def test_relation_of_no_rows_is_zero_with_backward() -> None:
    q = torch.zeros(0, 4, requires_grad=True)
    loss = relation_loss(q, torch.zeros(0, 4), 5.0, 10.0)
    loss.backward()
    assert loss.item() == 0.0


def test_relation_is_computed_in_float32_under_autocast() -> None:
    q, e = normalize(noise(8, 64, seed=1), dim=1).float(), normalize(noise(8, 64, seed=2), dim=1).float()
    plain = relation_loss(q, e, 5.0, 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = relation_loss(q, e, 5.0, 10.0)
    assert mixed.item() == pytest.approx(plain.item(), rel=1e-5)
