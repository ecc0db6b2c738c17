"""Level 2 (METHOD section 5) against the equations written with loops, and the order of the prompts."""

import math

import pytest
import torch
from torch import Tensor

from hdovd.modeling.losses.classwise import box_loss, classification_loss, cosine_logits, reliability


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive_cosine(a: Tensor, b: Tensor) -> float:
    dot = lambda x, y: sum(float(v) * float(w) for v, w in zip(x, y, strict=True))  # noqa: E731
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def naive_cross_entropy(logits: list[float], place: int) -> float:
    highest = max(logits)
    return highest + math.log(sum(math.exp(v - highest) for v in logits)) - logits[place]


def test_cosine_logits_equal_a_loop() -> None:
    features, prompts = 3 * noise(4, 5, seed=1), 0.2 * noise(6, 5, seed=2)
    logits = cosine_logits(features, prompts, 50.0)
    assert logits.dtype == torch.float32
    expected = [[50.0 * naive_cosine(f, p) for p in prompts] for f in features]
    torch.testing.assert_close(logits, torch.tensor(expected), atol=1e-4, rtol=0)


def test_cosine_logits_of_no_rois() -> None:
    features = torch.zeros(0, 5, requires_grad=True)
    logits = cosine_logits(features, noise(3, 5), 50.0)
    assert logits.shape == (0, 3)
    logits.sum().backward()


def test_cosine_logits_are_float32_under_autocast() -> None:
    features, prompts = noise(4, 64, seed=1).float(), noise(6, 64, seed=2).float()
    plain = cosine_logits(features, prompts, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cosine_logits(features, prompts, 50.0)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, plain, atol=1e-4, rtol=0)


def test_classification_equals_a_loop() -> None:
    logits, labels = 3 * noise(6, 5), torch.tensor([0, 4, 2, 3, 4, 1])
    weights = torch.tensor([1.0, 1.0, 0.3, 0.0, 1.3, 0.0], dtype=torch.float64)
    rows = [naive_cross_entropy(row.tolist(), int(k)) for row, k in zip(logits, labels, strict=True)]
    expected = sum(float(w) * row for w, row in zip(weights, rows, strict=True)) / 4  # two of the six weigh nothing
    assert classification_loss(logits, labels, weights).item() == pytest.approx(expected, abs=1e-12)


def test_classification_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    loss = classification_loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + 0.5 * math.log(2)) / 2)


@pytest.mark.parametrize("weights", [torch.zeros(3), torch.zeros(0)])
def test_classification_without_weight_is_zero_with_backward(weights: Tensor) -> None:
    logits = torch.randn(len(weights), 4, requires_grad=True)
    loss = classification_loss(logits, torch.zeros(len(weights), dtype=torch.int64), weights)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_box_loss_counts_base_positives_and_divides_by_all_rois() -> None:
    deltas = torch.tensor([[1.0, -2.0, 0.0, 0.5], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    targets = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0], [float("nan")] * 4])
    loss = box_loss(deltas, targets, torch.tensor([True, False, True, False]))
    assert loss.item() == pytest.approx((3.5 + 2.0) / 4)


def test_gradients_are_right() -> None:
    labels, weights = torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda rows: classification_loss(rows, labels, weights), (noise(3, 4).requires_grad_(),)
    )
    targets, is_base = noise(3, 4, seed=5), torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda rows: box_loss(rows, targets, is_base), (noise(3, 4).requires_grad_(),))


def test_box_loss_gradient_is_zero_outside_base_rois() -> None:
    deltas = torch.ones(3, 4, requires_grad=True)
    box_loss(deltas, torch.zeros(3, 4), torch.tensor([False, True, False])).backward()
    assert deltas.grad is not None
    torch.testing.assert_close(deltas.grad, torch.tensor([[0.0] * 4, [1 / 3] * 4, [0.0] * 4]))


@pytest.mark.parametrize("count", [0, 2])
def test_box_loss_without_base_rois_is_zero_with_backward(count: int) -> None:
    deltas = torch.randn(count, 4, requires_grad=True)
    loss = box_loss(deltas, torch.zeros(count, 4), torch.zeros(count, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0


def test_reliability_by_hand() -> None:
    angle = math.acos(0.31)
    visual = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[math.cos(angle), math.sin(angle)], [0.336, math.sqrt(1 - 0.336**2)], [0.0, 1.0]])
    w = reliability(visual, text, 0.31, 0.026, 1.3)
    expected = [0.65, 1.3 / (1 + math.exp(-1.0)), 1.3 / (1 + math.exp(0.31 / 0.026))]
    torch.testing.assert_close(w, torch.tensor(expected), atol=1e-5, rtol=0)


def test_reliability_of_no_boxes() -> None:
    assert reliability(torch.zeros(0, 4), torch.zeros(0, 4), 0.31, 0.026, 1.3).shape == (0,)


def test_shared_prompt_order_equals_the_ring_order_of_the_paper() -> None:
    """Image i's own prompts in the paper: [t_base; own u; the other images' u in ring order; bg]."""
    pseudo_counts, roi_count, base_count, dim = [2, 0, 3, 1], 7, 4, 6
    images, pseudo_count = len(pseudo_counts), sum(pseudo_counts)
    texts = noise(base_count, dim, seed=1).float()
    pseudo = [noise(count, dim, seed=2 + i).float() for i, count in enumerate(pseudo_counts)]
    features = noise(images * roi_count, dim, seed=9).float()
    background = noise(1, dim, seed=10).float()
    generator = torch.Generator().manual_seed(11)
    # a RoI's target: ("base", k), ("pseudo", j) of its own image, or ("background", 0)
    targets = []
    for i in range(images):
        for _ in range(roi_count):
            kind = ["base", "background", "pseudo"][
                int(torch.randint(3 if pseudo_counts[i] else 2, (), generator=generator))
            ]
            limit = {"base": base_count, "pseudo": pseudo_counts[i], "background": 1}[kind]
            targets.append((i, kind, int(torch.randint(limit, (), generator=generator))))
    assert {kind for _, kind, _ in targets} == {"base", "pseudo", "background"}
    weights = torch.where(torch.tensor([kind == "pseudo" for _, kind, _ in targets]), 0.7, 1.0)

    def label(image: int, kind: str, k: int, first_pseudo: int) -> int:
        return {"base": k, "pseudo": base_count + first_pseudo + k, "background": base_count + pseudo_count}[kind]

    shared_features, shared_background = features.clone().requires_grad_(), background.clone().requires_grad_()
    prompts = torch.cat([texts, *pseudo, shared_background])
    labels = torch.tensor([label(i, kind, k, sum(pseudo_counts[:i])) for i, kind, k in targets])
    shared = classification_loss(cosine_logits(shared_features, prompts, 50.0), labels, weights)
    shared.backward()

    ring_features, ring_background = features.clone().requires_grad_(), background.clone().requires_grad_()
    total = torch.zeros(())
    for roi, (i, kind, k) in enumerate(targets):
        ring = torch.cat([texts, *(pseudo[(i + step) % images] for step in range(images)), ring_background])
        cosine = (ring @ ring_features[roi]) / (ring.norm(dim=1) * ring_features[roi].norm())
        logits = 50.0 * cosine
        total = total + weights[roi] * (logits.logsumexp(0) - logits[label(i, kind, k, 0)])
    (total / len(targets)).backward()

    assert shared.item() == pytest.approx((total / len(targets)).item(), rel=1e-5)
    torch.testing.assert_close(shared_features.grad, ring_features.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared_background.grad, ring_background.grad, atol=1e-5, rtol=1e-4)
