"""The dense heads, the choice of queries, and the losses of both heads, against loops."""

import pytest
import torch
import torch.nn.functional as F
from adamixer_scenes import noise
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from hdovd.config.detector import QueryProposalsConfig
from hdovd.modeling.adamixer.decoder import SamplingTable
from hdovd.modeling.adamixer.model import (
    DenseHead,
    DensePredictions,
    ProposalTrunk,
    QueryProposals,
    auxiliary_losses,
    main_losses,
    positions,
    quality_focal_rows,
    valid_positions,
)
from hdovd.modeling.queries.pairs import Candidates

CONFIG = QueryProposalsConfig(shuffle=8, aux_positives=3)


def test_positions_row_by_row() -> None:
    assert positions((2, 3), 8, torch.device("cpu")).tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


def test_trunk_takes_channels_of_both_neighbours() -> None:
    """Of constant maps nothing is left but which level each channel is from: own 16, coarser 8, finer 8; at the ends
    their own.
    """
    trunk = ProposalTrunk(32, 8)
    maps = [torch.full((1, 32, side, side), float(side)) for side in (8, 4, 2)]
    found = [trunk._exchanged(maps, level)[0, :, 0, 0].tolist() for level in range(3)]
    assert found == [
        [8.0] * 16 + [4.0] * 8 + [8.0] * 8,
        [4.0] * 16 + [2.0] * 8 + [8.0] * 8,
        [2.0] * 16 + [2.0] * 8 + [4.0] * 8,
    ]
    assert [m.shape for m in trunk(maps)] == [m.shape for m in maps]


def test_dense_head_position_by_position() -> None:
    """Each channel over its norm in the level, not each position over its own: the released code's, in a loop."""
    head, maps, text = DenseHead(32, 6, 2), [noise(2, 32, 2, 3, seed=1), noise(2, 32, 1, 2, seed=2)], noise(6, seed=3)
    with torch.no_grad():
        head.scales[1].fill_(1.5)
        head.object_scale.fill_(3.0)
    found = head(maps, [8, 16], text)
    row = 0
    for level, stride in enumerate((8, 16)):
        reach, feature = head.deltas(maps[level]).exp() * head.scales[level] * stride, head.feature(maps[level])
        for y in range(maps[level].shape[2]):
            for x in range(maps[level].shape[3]):
                for n in range(2):
                    centre = torch.tensor([x + 0.5, y + 0.5]).repeat(2) * stride
                    box = centre + reach[n, :, y, x] * torch.tensor([-1.0, -1.0, 1.0, 1.0])
                    torch.testing.assert_close(found.boxes[n, row], box)
                    unit_channels = feature[n, :, y, x] / feature[n].flatten(1).norm(dim=1)
                    logit = head.object_scale * (unit_channels * text / text.norm()).sum() + head.object_bias
                    torch.testing.assert_close(found.probability[n, row], logit.sigmoid()[0])
                row += 1
    assert row == found.probability.shape[1]


def dense(boxes: list[list[float]], probability: list[float]) -> DensePredictions:
    return DensePredictions(torch.tensor([probability]), torch.tensor([boxes]))


def chooser(**settings: float) -> QueryProposals:
    return QueryProposals(QueryProposalsConfig(shuffle=8, **settings), 32, 4, 1)


OVERLAPPING = dense(
    [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [20, 0, 30, 9], [50, 0, 60, 10]], [0.5, 0.6, 0.9, 0.2, 0.0]
)


def test_queries_are_distinct_best_first_then_the_others() -> None:
    """Five candidates, of which two are copies and one has no probability: it is not trained on, and comes after the
    copies.
    """
    found = chooser().candidates(OVERLAPPING, [5])
    chosen = {tuple(box): bool(d) for box, d in zip(found.boxes[0].tolist(), found.distinct[0], strict=True)}
    assert [box for box, d in chosen.items() if d] == [(20, 0, 30, 10), (0, 0, 10, 9)]
    queries = chooser().choose(found, 3)[0].tolist()
    assert queries == [[20, 0, 30, 10], [0, 0, 10, 9], [0, 0, 10, 10]]
    assert chooser().choose(found, 300).shape == (1, 5, 4)


def test_best_of_each_level_and_pictures_apart() -> None:
    """Two levels of which each gives one candidate; the same box in two pictures is distinct in both."""
    both = DensePredictions(
        torch.tensor([[0.5, 0.6, 0.9, 0.2]] * 2), torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(2, 4, 4)
    )
    found = chooser(pre_nms=1).candidates(both, [2, 2])
    assert found.probability.tolist() == torch.tensor([[0.6, 0.9]] * 2).tolist()
    assert found.distinct.tolist() == [[False, True]] * 2


def test_quality_focal_rows_by_hand() -> None:
    p = torch.tensor([0.25, 0.25, 0.0])
    rows = quality_focal_rows(p, torch.tensor([0.75, 0.75, 0.0]), torch.tensor([True, False, False]))
    ln = torch.tensor([0.25, 0.75]).log()
    assert rows[0].item() == pytest.approx(float(-(0.75 * ln[0] + 0.25 * ln[1]) * 0.25))
    assert rows[1].item() == pytest.approx(float(-ln[1] * 0.0625))
    assert rows[2].item() == 0


OBJECTS = torch.tensor([[[2.0, 3.0, 30.0, 28.0], [10.0, 4.0, 34.0, 30.0], [0.0, 0.0, 0.0, 0.0]], [[0.0] * 4] * 3])
IS_OBJECT = torch.tensor([[True, True, False], [False, False, False]])


def scene(seed: int) -> tuple[DensePredictions, Tensor, Tensor]:
    """Two pictures of 5 x 5 positions with boxes near OBJECTS; the second has no object. The last row of positions is
    not valid.
    """
    centres, _ = valid_positions([torch.Size([5, 5])], [8], torch.tensor([[32.0, 40.0], [40.0, 40.0]]))
    reach = (noise(2, 25, 4, seed=seed) * 0.2).exp() * 12
    boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1).requires_grad_()
    probability = noise(2, 25, seed=seed + 1).sigmoid().requires_grad_()
    valid = torch.arange(25).repeat(2, 1) < 20
    return DensePredictions(probability, boxes), centres, valid


def naive_auxiliary(found: DensePredictions, centres: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One picture with objects: TOOD's assignment, target by target."""
    p, boxes, objects = found.probability[0], found.boxes[0], OBJECTS[0, :2]
    iou = box_iou(boxes.detach(), objects)
    measure = p.detach()[:, None] * iou**6
    wanted_by: dict[int, list[int]] = {}
    for j in range(2):
        ranked = sorted((a for a in range(25) if valid[0, a]), key=lambda a: -float(measure[a, j]))[:3]
        for a in ranked:
            x, y = centres[a]
            inside = min(x - objects[j, 0], y - objects[j, 1], objects[j, 2] - x, objects[j, 3] - y) > 0.01
            if inside and measure[a, j] > 0:
                wanted_by.setdefault(a, []).append(j)
    owner = {a: max(js, key=lambda j: float(iou[a, j])) for a, js in wanted_by.items()}
    y = torch.zeros(25)
    for j in range(2):
        own = [a for a, o in owner.items() if o == j]
        for a in own:
            y[a] = measure[a, j] / (max(measure[b, j] for b in own) + 1e-7) * max(iou[b, j] for b in own)
    cls = sum(F.binary_cross_entropy(p[a], y[a]) * (y[a] - p[a]).abs() ** 2 for a in range(20))
    box = sum(y[a] * (1 - generalized_box_iou(boxes[a : a + 1], objects[j : j + 1])[0, 0]) for a, j in owner.items())
    count = max(1.0, float(y.sum()))
    return cls / count, 2 * box / count


@pytest.mark.parametrize("seed", [1, 11, 21])
def test_auxiliary_losses_and_gradients(seed: int) -> None:
    found, centres, valid = scene(seed)
    results = []
    for losses in (
        naive_auxiliary(found, centres, valid),
        auxiliary_losses(found, centres, valid, OBJECTS, IS_OBJECT, CONFIG),
    ):
        gradients = torch.autograd.grad(losses[0] + 3 * losses[1], [found.probability, found.boxes])
        results.append([*losses, *gradients])
    for mine, naive in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, naive, atol=1e-6, rtol=1e-4)
    assert results[0][1] > 0


def test_a_position_that_two_equal_objects_want_counts_once() -> None:
    found, centres, valid = scene(1)
    twice, both = OBJECTS[:, [0, 0, 2]], IS_OBJECT
    once = auxiliary_losses(found, centres, valid, OBJECTS, torch.tensor([[True, False, False], [False] * 3]), CONFIG)
    torch.testing.assert_close(auxiliary_losses(found, centres, valid, twice, both, CONFIG), once)


def test_main_losses_by_hand() -> None:
    """Candidate 0 is the object's (IoU 0.5, p 0.8), 1 is nobody's, 2 is no distinct one. The second picture has no
    object.
    """
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0], [0.0, 0.0, 10.0, 10.0]]]).repeat(2, 1, 1)
    found = Candidates(
        torch.tensor([[0.8, 0.3, 0.9]]).repeat(2, 1), boxes, torch.tensor([[True, True, False]]).repeat(2, 1)
    )
    objects = torch.tensor([[[0.0, 0.0, 10.0, 20.0]], [[0.0] * 4]])
    cls, box = main_losses(found, objects, torch.tensor([[True], [False]]), torch.tensor([[0], [-1]]), CONFIG)
    aligned = 0.8 * 0.5**6
    y = aligned / (aligned + 1e-7) * 0.5
    p = torch.tensor([0.8, 0.3])
    expected = (
        F.binary_cross_entropy(p[0], torch.tensor(y)) * (y - 0.8) ** 2
        + F.binary_cross_entropy(p[1], torch.tensor(0.0)) * 0.09
    )
    assert cls.item() == pytest.approx(float(expected), rel=1e-5)  # divided by 1, as the qualities' sum is less
    assert box.item() == pytest.approx(2 * y * 0.5, rel=1e-5)


def test_no_object_at_all() -> None:
    found, centres, valid = scene(1)
    losses = auxiliary_losses(found, centres, valid, OBJECTS, torch.zeros_like(IS_OBJECT), CONFIG)
    candidates = Candidates(found.probability, found.boxes, torch.ones(2, 25, dtype=torch.bool))
    losses += main_losses(candidates, OBJECTS, torch.zeros_like(IS_OBJECT), torch.full((2, 3), -1), CONFIG)
    sum(losses).backward()
    assert [float(loss.detach()) for loss in losses] == [0.0] * 4
    assert found.boxes.grad.abs().max() == found.probability.grad.abs().max() == 0


def test_valid_positions_by_hand() -> None:
    """A picture of 40 x 70 alone is padded to 64 x 96; stride 64 is longer than its shorter side, so its only level is
    32's.
    """
    centres, valid = valid_positions(
        [torch.Size([4, 4]), torch.Size([2, 2])], [32, 64], torch.tensor([[40.0, 70.0], [128.0, 128.0]])
    )
    assert centres.shape == (20, 2)
    assert valid[0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6]
    assert bool(valid[1].all())


def test_content_is_the_pyramid_at_the_boxes_centre() -> None:
    proposals = chooser()
    pixels = noise(1, 32, 4, 4, seed=2)
    content = proposals.content(SamplingTable([pixels], [8]), torch.tensor([[[8.0, 16.0, 16.0, 24.0]]]))
    torch.testing.assert_close(
        content[0, 0], F.layer_norm(pixels[0, :, 2, 1], (32,))
    )  # centre (12, 20) is that of cell (1, 2)
