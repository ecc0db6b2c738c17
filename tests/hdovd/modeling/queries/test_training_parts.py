"""Matching, the losses of the stages and of the levels, against loops over stages, pictures and boxes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adamixer_scenes import DIM, noise, small, targets, unit
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from hdovd.config.detector import MatchCosts, StageLossConfig, TextLevelConfig
from hdovd.modeling.levels.classwise import prompts_and_labels
from hdovd.modeling.losses.classwise import classification_loss, reliability
from hdovd.modeling.losses.instance import relation_loss
from hdovd.modeling.queries.losses import InstanceLevels, TextLevel, box_losses, fused, objectness_loss, query_weights
from hdovd.modeling.queries.pairs import (
    NONE,
    Pairs,
    StepBoxes,
    boxes_of_step,
    pair,
    pair_candidates,
    pair_stages,
    pairing_costs,
)

S, N, Q = 2, 3, 6
SIZES = [(96, 128), (80, 64), (96, 96)]
BASE_BOXES = [[[2.0, 3.0, 40.0, 50.0], [60.0, 10.0, 100.0, 60.0]], [], [[5.0, 5.0, 45.0, 45.0]]]
PSEUDO_BOXES = [
    [[10.0, 10.0, 30.0, 80.0], [50.0, 40.0, 99.0, 90.0]],
    [[0.0, 8.0, 40.0, 60.0]],
    [],
]  # the first is 20 px wide
LABELS = [[1, 3], [], [1]]


def step_boxes(*, with_pseudo: bool = True, settings: tuple[str, ...] = ()) -> StepBoxes:
    recipe = small(*settings)
    rows = [
        targets(b, p, labels, 10 * i)
        for i, (b, p, labels) in enumerate(zip(BASE_BOXES, PSEUDO_BOXES, LABELS, strict=True))
    ]
    return boxes_of_step(rows, SIZES, recipe.pseudo_boxes, recipe.loss.class_, with_pseudo=with_pseudo)


def predictions() -> Tensor:
    """Boxes of queries, (S, N, Q, 4): of the first two near the first boxes of their picture, of the others
    anywhere."""
    corner = noise(S, N, Q, 2, seed=1).abs() * 30
    boxes = torch.cat([corner, corner + 20 + noise(S, N, Q, 2, seed=2).abs() * 20], dim=-1)
    for n in range(N):
        for i, box in enumerate([*BASE_BOXES[n], *PSEUDO_BOXES[n]][:2]):
            boxes[:, n, i] = torch.tensor(box) + noise(S, 4, seed=3 + i)
    return boxes


def paired(boxes: StepBoxes, predicted: Tensor) -> Pairs:
    cost, iou = pairing_costs(noise(S, N, Q, seed=4).sigmoid(), predicted, boxes.padded, boxes.sizes, MatchCosts())
    query = pair_stages(cost.numpy(), boxes)
    return Pairs.of(query, torch.from_numpy(query), iou.numpy(), iou, boxes)


def test_boxes_of_a_step() -> None:
    """Small pseudo boxes are dropped; the proposals' objects hold the others in every epoch."""
    boxes, early = step_boxes(), step_boxes(with_pseudo=False)
    assert (boxes.base, boxes.pseudo, early.pseudo) == ([2, 0, 1], [1, 1, 0], [0, 0, 0])
    assert boxes.places == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 0)]
    assert torch.equal(boxes.padded[boxes.picture, boxes.column], boxes.boxes)
    assert boxes.is_base.tolist() == boxes.base_on_host.tolist() == [True, True, False, False, True]
    assert boxes.labels.tolist() == [1, 3, -1, -1, 1]
    u, v = boxes.targets[0].pseudo_texts, boxes.targets[0].pseudo_embeddings
    torch.testing.assert_close(boxes.weights[2:3], reliability(v, u, 0.31, 0.026, 1.3))
    for form in (boxes, early):
        assert form.is_object.sum(dim=1).tolist() == form.object_counts == [3, 1, 1]
        assert form.objects[0, 2].tolist() == PSEUDO_BOXES[0][1]


def test_cost_by_hand() -> None:
    """p 0.5: focal 0.75 * 0.25 ln 0.5 - 0.25 * 0.25 ln 0.5. Box 10 x 10 px off by 5 px in x, in a picture of 50 x
    100."""
    cost, iou = pairing_costs(
        torch.tensor([[0.5]]),
        torch.tensor([[[5.0, 0.0, 15.0, 10.0]]]),
        torch.tensor([[[0.0, 0.0, 10.0, 10.0]]]),
        torch.tensor([[50.0, 100.0]]),
        MatchCosts(objectness=2.0, l1=5.0, giou=2.0),
    )
    assert iou.item() == pytest.approx(1 / 3)
    assert cost.item() == pytest.approx(2 * 0.125 * math.log(0.5) + 5 * 2 * 0.05 - 2 / 3, rel=1e-5)


def test_base_boxes_choose_first_and_each_query_has_one_box() -> None:
    """Query 0 is the best for both boxes of picture 0, base and pseudo: the base box has it."""
    boxes = step_boxes()
    cost = np.ones((1, N, Q, 3), dtype=np.float32)
    cost[0, 0, 0] = [0.5, 1.0, 0.0]
    query = pair_stages(cost, boxes)[0]
    assert query[0] == 0
    assert 0 not in query[1:3]
    assert len(set(query.tolist())) == len(query)
    assert [place // Q for place in query] == [n for n, _ in boxes.places]


def test_more_boxes_than_queries_and_costs_that_are_no_numbers() -> None:
    assert sorted(pair(np.zeros((2, 4), dtype=np.float32)).tolist()) == [NONE, NONE, 0, 1]
    assert pair(np.zeros((0, 2), dtype=np.float32)).tolist() == [NONE, NONE]
    assert pair(np.zeros((3, 0), dtype=np.float32)).shape == (0,)
    assert pair(np.array([[np.nan, 0.0], [0.0, np.inf]], dtype=np.float32)).tolist() == [1, 0]
    few = pair_stages(np.zeros((1, N, 2, 3), dtype=np.float32), step_boxes())[0]
    assert few[:3].tolist() in ([0, 1, NONE], [1, 0, NONE])  # both queries are the base boxes'


def test_candidates_that_are_not_distinct_take_no_part() -> None:
    cost = np.array([[[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]]], dtype=np.float32)
    assert pair_candidates(cost, np.array([[0, 1, 1], [0, 0, 0]], dtype=np.float32), [1, 1]).tolist() == [[1], [NONE]]


def naive_stage(
    s: int,
    boxes: StepBoxes,
    pairs: Pairs,
    predicted: Tensor,
    scores: Tensor,
    logits: Tensor,
    labels: Tensor,
    config: StageLossConfig,
) -> list[Tensor]:
    """Classification, objectness, L1 and 1 - GIoU of one stage, sums, query by query."""
    total = [torch.zeros(()) for _ in range(4)]
    background = scores.shape[-1] - 1
    for n in range(N):
        own = [g for g, (picture, _) in enumerate(boxes.places) if picture == n]
        box_of = {int(pairs.on_host[s, g]) % Q: g for g in own if pairs.on_host[s, g] != NONE}
        for q in range(Q):
            box = predicted[s, n, q : q + 1]
            label, weight = background, config.unmatched_weight
            if q in box_of:
                g = box_of[q]
                label, weight = int(labels[g]), float(boxes.weights[g])
                if box_iou(box.detach(), boxes.boxes[g : g + 1]) < config.poor_iou:
                    weight = 0.0
                if boxes.is_base[g]:
                    side = torch.tensor(SIZES[n]).flip(0).repeat(2)
                    total[2] = total[2] + ((box[0] - boxes.boxes[g]) / side).abs().sum()
                    total[3] = total[3] + 1 - generalized_box_iou(box, boxes.boxes[g : g + 1])[0, 0]
            elif any(box_iou(box.detach(), boxes.boxes[g : g + 1]) > config.near_iou for g in box_of.values()):
                weight = 0.0
            total[0] = total[0] + weight * F.cross_entropy(scores[s, n, q], torch.tensor(label))
            p, y = logits[s, n, q].sigmoid(), float(q in box_of)
            total[1] = total[1] - (0.25 * y * (1 - p) ** 2 * p.log() + 0.75 * (1 - y) * p**2 * (1 - p).log())
    return total


@pytest.mark.parametrize("settings", [(), ("loss.class.enabled=false",)])
def test_stage_losses_query_by_query(settings: tuple[str, ...]) -> None:
    boxes, config = step_boxes(settings=settings), StageLossConfig(near_iou=0.25, poor_iou=0.75)
    predicted = predictions().requires_grad_()
    pairs = paired(boxes, predicted.detach())
    texts, background = unit(4, DIM, seed=7), unit(1, DIM, seed=8)
    prompts, labels = prompts_and_labels(boxes.targets, texts, background, with_pseudo=not settings)
    own = torch.cat([t.pseudo_texts for t in boxes.targets])
    assert torch.equal(prompts, torch.cat([texts, background] if settings else [texts, own, background]))
    assert labels.tolist() == ([1, 3, 4, 4, 1] if settings else [1, 3, 4, 5, 1])
    scores, logits = noise(S, N, Q, len(prompts), seed=5).requires_grad_(), noise(S, N, Q, seed=6).requires_grad_()
    count = torch.tensor(3.0)
    weights = query_weights(pairs, boxes, config)
    given = {round(v, 4) for v in weights.flatten().tolist()}
    assert {0.0, 0.5, 1.0} <= given  # unmatched and near or poorly matched; unmatched; matched
    mine = [
        classification_loss(
            scores.flatten(0, 2), pairs.to_queries(labels, len(prompts) - 1).flatten(), weights.flatten(), count
        ),
        objectness_loss(logits, pairs.to_queries(torch.ones_like(boxes.weights), 0.0), count),
        *box_losses(predicted, pairs, boxes, count),
    ]
    naive = [
        sum(one) / count
        for one in zip(
            *(naive_stage(s, boxes, pairs, predicted, scores, logits, labels, config) for s in range(S)), strict=True
        )
    ]
    for one, other in zip(mine, naive, strict=True):
        torch.testing.assert_close(one, other)
    leaves = [predicted, scores, logits]
    for one, other in zip(torch.autograd.grad(sum(mine), leaves), torch.autograd.grad(sum(naive), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_students_in_the_order_of_queries() -> None:
    boxes, c = step_boxes(), noise(S, N, Q, DIM, seed=9)
    predicted = predictions()
    pairs = paired(boxes, predicted)
    for s, (q, box) in enumerate(pairs.students(c)):
        expected = []
        for n in range(N):
            for query in range(Q):
                for g, (picture, _) in enumerate(boxes.places):
                    matched = picture == n and pairs.on_host[s, g] == n * Q + query
                    if matched and box_iou(predicted[s, n, query : query + 1], boxes.boxes[g : g + 1]) > 0.5:
                        expected.append((g, F.normalize(c[s, n, query], dim=0)))
        assert len(expected) >= 2
        assert box.tolist() == [g for g, _ in expected]
        torch.testing.assert_close(q, torch.stack([row for _, row in expected]))


def test_instance_level_has_memories_of_its_own_a_stage() -> None:
    level = InstanceLevels(small().loss.instance, 2, DIM)
    q, e = unit(3, DIM, seed=1).requires_grad_(), unit(3, DIM, seed=2)
    losses = level([q, q[:1]], [e, e[:1]])  # one pair is too few
    assert [len(queue.read()) for queue in level.student_queues] == [3, 0]
    assert losses["instance_relation"].item() == pytest.approx(5 * relation_loss(q, e, 5.0, 10.0).item())
    second = level([q, q], [e, e])
    first, last = 20 * q @ torch.cat([e, e]).T, 20 * q @ e.T
    back, only = 20 * e @ torch.cat([q, q]).T, 20 * e @ q.T
    expected = sum(0.5 * 0.5 * F.cross_entropy(rows, torch.arange(3)) for rows in (first, back, last, only))
    torch.testing.assert_close(second["instance_alignment"], expected)
    nothing = level([q[:0], q[:0]], [e[:0], e[:0]])
    assert [loss.item() for loss in nothing.values()] == [0, 0]


def naive_text(
    features: Tensor,
    labels: list[int],
    iou: list[float],
    pseudo: Tensor,
    u: Tensor,
    w: Tensor,
    texts: Tensor,
    means: Tensor,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The released code's order: present classes, pseudo boxes, absent classes."""
    present = sorted(set(labels))
    absent = [k for k in range(len(texts)) if k not in present]
    centroids = {}
    for k in present:
        rows = [i for i, label in enumerate(labels) if label == k]
        share = torch.tensor([iou[i] for i in rows]).softmax(dim=0)
        centroids[k] = sum(s * features[i] for s, i in zip(share, rows, strict=True))
    x = F.normalize(torch.cat([torch.stack([centroids[k] for k in present]), pseudo, means[absent]]), dim=1)
    y = torch.cat([texts[present], u, texts[absent]])
    count = len(present) + len(u)
    rows = F.cross_entropy(20 * x[:count] @ y.T, torch.arange(count), reduction="none")
    return (
        0.5 * (torch.cat([torch.ones(len(present)), w]) * rows).mean(),
        5 * relation_loss(x, y, 5.0, 10.0),
        centroids,
    )


def test_text_level_and_its_means_over_two_steps() -> None:
    """Step 2 has other classes, so the means of step 1 take part."""
    level, texts = TextLevel(TextLevelConfig(), 1, DIM), unit(5, DIM, seed=1)
    means = texts.clone()
    for step, labels in enumerate(([1, 3, 1], [0, 2, 2])):
        features, pseudo = noise(3, DIM, seed=2 + step).requires_grad_(), noise(2, DIM, seed=4 + step).requires_grad_()
        iou, u, w = [0.3, 0.9, 0.8], unit(2, DIM, seed=6 + step), torch.tensor([0.4, 1.2])
        found = level(
            [(features, torch.tensor(labels), torch.tensor(iou))], [(pseudo, u, w)], torch.tensor(labels), texts
        )
        aligned, related, centroids = naive_text(features, labels, iou, pseudo, u, w, texts, means)
        torch.testing.assert_close(found["text_alignment"], aligned)
        torch.testing.assert_close(found["text_relation"], related, rtol=1e-4, atol=1e-6)
        mine = torch.autograd.grad(sum(found.values()), [features, pseudo])
        for one, other in zip(mine, torch.autograd.grad(aligned + related, [features, pseudo]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        decay = 0.9999 * (1 - math.exp(-(step + 1) / 2000))
        for k, centroid in centroids.items():
            means[k] = decay * means[k] + (1 - decay) * centroid.detach()
        torch.testing.assert_close(level.centroids[0], means)
    again = TextLevel(TextLevelConfig(), 1, DIM)
    again.load_state_dict(level.state_dict())  # its number of classes comes with the checkpoint
    assert torch.equal(again.centroids, level.centroids)
    assert again.updates.item() == 2


def test_text_level_with_one_class_or_nothing() -> None:
    """Nothing to relate: no loss, and the means stay. A class whose box has no query has a centroid of zero."""
    texts = unit(5, DIM, seed=1)
    level, nobody = TextLevel(TextLevelConfig(), 1, DIM), (torch.zeros(0, DIM), torch.zeros(0, DIM), torch.zeros(0))
    row = noise(1, DIM, seed=2).requires_grad_()
    for base, labels in ((row, [3, 3]), (row[:0], [])):
        numbers = torch.tensor(labels, dtype=torch.int64)
        losses = level([(base, numbers[: len(base)], torch.ones(len(base)))], [nobody], numbers, texts)
        assert [loss.item() for loss in losses.values()] == [0, 0]
        assert torch.equal(level.centroids[0], texts)
    assert level.updates.item() == 0
    losses = level([(row, torch.tensor([3]), torch.ones(1))], [nobody], torch.tensor([3, 1]), texts)
    sum(losses.values()).backward()
    assert bool(row.grad.isfinite().all())
    assert fused(row, torch.tensor([3]), torch.ones(1), 5)[1].abs().max() == 0
