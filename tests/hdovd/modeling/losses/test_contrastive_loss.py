"""InfoNCE with memory (METHOD sections 4 and 6) against the equation written with loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hdovd.modeling.losses.contrastive import alignment_loss


def rows(count: int, dim: int = 4, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def cross_entropy(logits: list[float], place: int) -> float:
    return math.log(sum(math.exp(v) for v in logits)) - logits[place]


def naive_alignment(q: Tensor, e: Tensor, q_memory: Tensor, e_memory: Tensor, tau: float) -> float:
    total, n = 0.0, len(q)
    for k in range(n):
        to_teacher = [tau * float(q[k] @ row) for row in [*e, *e_memory]]
        to_student = [tau * float(e[k] @ row) for row in [*q, *q_memory]]
        total += (cross_entropy(to_teacher, k) + cross_entropy(to_student, k)) / 2
    return total / n


@pytest.mark.parametrize("held", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equals_the_equation(n: int, held: int) -> None:
    q, e, q_memory, e_memory = rows(n, seed=1), rows(n, seed=2), rows(held, seed=3), rows(held, seed=4)
    expected = naive_alignment(q, e, q_memory, e_memory, 20.0)
    assert alignment_loss(q, e, q_memory, e_memory, 20.0).item() == pytest.approx(expected, abs=1e-12)


def test_memories_of_both_sides_are_told_apart() -> None:
    q, e, q_memory, e_memory = rows(3, seed=1), rows(3, seed=2), rows(4, seed=3), rows(4, seed=4)
    crossed = alignment_loss(q, e, e_memory, q_memory, 20.0)
    assert abs(crossed.item() - naive_alignment(q, e, q_memory, e_memory, 20.0)) > 1e-3


@pytest.mark.parametrize("n", [2, 4])
def test_student_equal_to_an_orthonormal_teacher(n: int) -> None:
    same = torch.eye(6, dtype=torch.float64)[:n]
    none = same[:0]
    expected = math.log(math.exp(2.0) + n - 1) - 2.0
    assert alignment_loss(same, same, none, none, 2.0).item() == pytest.approx(expected, abs=1e-12)


def test_orthogonal_memory_adds_one_negative_a_row() -> None:
    basis = torch.eye(6, dtype=torch.float64)
    expected = math.log(math.exp(3.0) + 1 + 4) - 3.0
    assert alignment_loss(basis[:2], basis[:2], basis[2:], basis[2:], 3.0).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_is_right() -> None:
    q, e = rows(3, seed=1).requires_grad_(), rows(3, seed=2).requires_grad_()
    q_memory, e_memory = rows(2, seed=3), rows(2, seed=4)
    assert torch.autograd.gradcheck(lambda a, b: alignment_loss(a, b, q_memory, e_memory, 5.0), (q, e))


def test_no_rows_give_zero_with_backward() -> None:
    q = torch.zeros(0, 4, requires_grad=True)
    loss = alignment_loss(q, torch.zeros(0, 4), rows(2).float(), rows(2).float(), 20.0)
    loss.backward()
    assert loss.item() == 0.0
    assert q.grad is not None
    assert q.grad.shape == (0, 4)


def test_is_computed_in_float32_under_autocast() -> None:
    q, e = rows(6, 64, seed=1).float(), rows(6, 64, seed=2).float()
    plain = alignment_loss(q, e, e, q, 20.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = alignment_loss(q, e, e, q, 20.0)
    assert mixed.item() == pytest.approx(plain.item(), abs=1e-5)
