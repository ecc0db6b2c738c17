"""The object localisation network: what it learns from, what it must not learn from, and its score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.modeling.losses.localisation import centerness
from hdovd.modeling.proposals.networks import _BOX, _SCORE, CenternessRPN, ObjectLocalisationNetwork, sample_near

SETTINGS = (
    "detector.backbone.fpn_channels=4",
    "detector.backbone.levels=[3, 4]",
    "detector.rpn.anchor_sizes=[[16], [32], [64]]",
    "detector.rpn.samples=400",
    "proposals.rois=40",
    "proposals.rpn_nms=1.0",
    "proposals.box_iou=0.6",
    "input.short_side=64",
    "input.long_side=96",
    "detector.head.fc_channels=8",
)
BOXES = torch.tensor([[10.0, 8.0, 40.0, 42.0], [44.0, 40.0, 60.0, 58.0]])


def recipe(*settings: str) -> Recipe:
    return load_recipe("demo", [*SETTINGS, *settings])


def scene() -> tuple[CenternessRPN, ImageList, dict[str, Tensor], Tensor]:
    """An RPN, a batch of one picture, its features and its anchors."""
    torch.manual_seed(0)
    rpn, images = CenternessRPN(recipe()).train(), ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)])
    features = {str(level): torch.randn(1, 4, 64 >> level, 64 >> level) for level in (3, 4, 5)}
    return rpn, images, features, rpn.anchor_generator(images, list(features.values()))[0]


def test_anchors_are_square_and_one_a_location_and_size() -> None:
    _, _, _, anchors = scene()
    assert len(anchors) == 8 * 8 + 4 * 4 + 2 * 2
    assert torch.equal(anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1])


def test_only_anchors_near_a_base_box_learn() -> None:
    rpn, _, _, anchors = scene()
    (learns,), (boxes,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": BOXES}])
    overlap = box_iou(BOXES, anchors)
    best, whose = overlap.max(dim=0)
    assert torch.equal((learns & _SCORE) > 0, best >= 0.3)  # 400 samples take in all of them
    expected = best >= 0.6
    for row in overlap:
        expected |= row == row.max()  # every box has its best anchor
    assert torch.equal((learns & _BOX) > 0, expected)
    assert expected.sum() >= 2
    assert torch.equal(boxes[learns > 0], BOXES[whose][learns > 0])


@pytest.mark.parametrize("settings", [(), ("detector.rpn.samples=3",)])
def test_samples_are_drawn_by_the_key(settings: tuple[str, ...]) -> None:
    rpn = CenternessRPN(recipe(*settings))
    _, _, _, anchors = scene()
    draws = [
        rpn.assign_targets_to_anchors([anchors], [{"boxes": BOXES, "key": key}])[0][0] for key in (1, 1, *range(2, 8))
    ]
    assert torch.equal(draws[0], draws[1])
    if settings:
        assert all(int(((learns & _SCORE) > 0).sum()) == 3 for learns in draws)
        assert len({tuple(learns.tolist()) for learns in draws}) > 1


def test_without_boxes_no_anchor_learns() -> None:
    rpn, _, _, anchors = scene()
    (learns,), (boxes,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": torch.zeros(0, 4)}])
    assert not learns.any()
    assert boxes.shape == anchors.shape


def test_what_is_far_from_base_boxes_is_never_taught() -> None:
    """An object that nobody labelled lies there: no logit and no box of it may have a gradient."""
    rpn, images, features, anchors = scene()
    outputs: list[tuple[list[Tensor], list[Tensor]]] = []

    def keep(_: object, __: object, output: tuple[list[Tensor], list[Tensor]]) -> None:
        for tensor in (*output[0], *output[1]):
            tensor.retain_grad()
        outputs.append(output)

    rpn.head.register_forward_hook(keep)
    _, losses = rpn(images, features, [{"boxes": BOXES[:1]}])
    sum(losses.values()).backward()
    logits = torch.cat([t.grad.permute(0, 2, 3, 1).flatten() for t in outputs[0][0]])  # type: ignore[union-attr]
    deltas = torch.cat([t.grad.permute(0, 2, 3, 1).reshape(-1, 4) for t in outputs[0][1]])  # type: ignore[union-attr]
    far = box_iou(BOXES[:1], anchors)[0] < 0.3
    assert far.sum() > 60
    assert not logits[far].any()
    assert not deltas[far].any()
    assert (logits[~far] != 0).all()


def test_rpn_losses_equal_loops() -> None:
    rpn, images, features, anchors = scene()
    with torch.no_grad():
        scores, deltas = rpn.head(list(features.values()))
        _, losses = rpn(images, features, [{"boxes": BOXES}])
    logits = torch.cat([s.permute(0, 2, 3, 1).flatten() for s in scores])
    decoded = rpn.box_coder.decode(torch.cat([d.permute(0, 2, 3, 1).reshape(-1, 4) for d in deltas]), [anchors])[:, 0]
    (learns,), (boxes,) = rpn.assign_targets_to_anchors([anchors], [{"boxes": BOXES}])
    near = [k for k in range(len(anchors)) if learns[k] & _SCORE]
    best = [k for k in range(len(anchors)) if learns[k] & _BOX]
    wanted = centerness(rpn.box_coder.encode([boxes], [anchors])[0])
    assert losses["loss_objectness"].item() == pytest.approx(
        sum(abs(1 / (1 + math.exp(-float(logits[k]))) - float(wanted[k])) for k in near) / len(near), rel=1e-5
    )
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(
        sum(1 - float(box_iou(decoded[k][None], boxes[k][None])) for k in best) / len(best), rel=1e-4
    )


def test_rois_near_a_box_and_the_boxes_themselves() -> None:
    proposals = torch.tensor(
        [[12.0, 8.0, 42.0, 42.0], [0.0, 0.0, 9.0, 9.0], [44.0, 50.0, 60.0, 68.0]]
    )  # near, far, IoU 0.29
    rois, boxes, overlaps = sample_near(proposals, BOXES, 10, 0.3, key=5)
    assert rois.tolist() == [*BOXES.tolist(), proposals[0].tolist()]
    assert boxes.tolist() == [*BOXES.tolist(), BOXES[0].tolist()]
    assert overlaps.tolist() == pytest.approx([1.0, 1.0, 28 * 34 / (2 * 30 * 34 - 28 * 34)])
    assert len(sample_near(proposals, BOXES, 2, 0.3, key=5)[0]) == 2
    assert [len(t) for t in sample_near(proposals, torch.zeros(0, 4), 10, 0.3, key=5)] == [0, 0, 0]


def test_score_is_the_geometric_mean_of_centerness_and_iou() -> None:
    torch.manual_seed(0)
    network = ObjectLocalisationNetwork(recipe()).eval()
    images, features = (
        ImageList(torch.zeros(2, 3, 64, 64), [(64, 64), (50, 60)]),
        {str(level): torch.randn(2, 4, 64 >> level, 64 >> level) for level in (3, 4, 5)},
    )
    torch.nn.init.zeros_(network.head.iou.weight)
    torch.nn.init.constant_(network.head.iou.bias, math.log(0.36 / 0.64))  # every IoU is 0.36
    with torch.no_grad():
        found, rois = network.scored(images, features), network.rpn.scored_proposals(images, features)
    for (boxes, scores), (_, centernesses), (height, width) in zip(found, rois, images.image_sizes, strict=True):
        torch.testing.assert_close(scores, 0.6 * centernesses.sqrt())
        assert len(boxes) == len(scores) > 10
        assert boxes.min() >= 0
        assert (boxes <= torch.tensor([width, height, width, height])).all()


def test_it_learns_to_find_an_object() -> None:
    """A few steps on one picture: the best proposal is the labelled square, and its score says that it fits."""
    torch.manual_seed(0)
    network = ObjectLocalisationNetwork(
        recipe("detector.backbone.fpn_channels=16", "detector.head.fc_channels=32")
    ).train()
    picture = torch.randint(100, 130, (3, 64, 64), dtype=torch.uint8)
    picture[:, 16:40, 20:44] = 250
    box = torch.tensor([[20.0, 16.0, 44.0, 40.0]])
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 40)
    for step in range(40):
        optimizer.zero_grad()
        sum(network([picture], [box], [step]).values()).backward()
        optimizer.step()
        decay.step()
    ((boxes, scores),) = network.eval().propose([picture])
    assert box_iou(boxes[:1], box).item() > 0.6
    assert scores[0] > 0.6
