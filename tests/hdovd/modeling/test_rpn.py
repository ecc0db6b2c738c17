"""The region proposal network: its losses against loops, its scores, its anchors."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from hdovd.config.detector import RpnConfig
from hdovd.core import HdovdError
from hdovd.modeling.rpn import ObjectnessRPN, build_rpn

CONFIG = RpnConfig(anchor_sizes=[[16], [32]], samples=64, pre_nms=50, post_nms=20, nms=0.7)


def build(**settings: object) -> ObjectnessRPN:
    torch.manual_seed(0)
    return build_rpn(CONFIG.model_copy(update=settings), 4, 2)


def scene(images: int = 2) -> tuple[ImageList, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    features = {str(level): torch.randn(images, 4, 64 >> level, 64 >> level, generator=generator) for level in (3, 4)}
    return ImageList(torch.zeros(images, 3, 64, 64), [(64, 64), (50, 60)][:images]), features


def predictions(anchors: int = 12) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Scores, deltas, labels (1 object, 0 background, -1 neither) and targets of two images of `anchors / 2`."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(anchors, 1, generator=generator, dtype=torch.float64)
    deltas = 0.3 * torch.randn(anchors, 4, generator=generator, dtype=torch.float64)
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0, -1.0, 0.0])]
    targets = 0.3 * torch.randn(anchors, 4, generator=generator, dtype=torch.float64)
    return scores, deltas, labels, list(targets.split(anchors // 2))


def naive_bce(logit: float, target: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def test_objectness_losses_equal_loops() -> None:
    scores, deltas, labels, targets = predictions()
    score, box = build().compute_loss(scores, deltas, labels, targets)
    kinds, wanted = torch.cat(labels).tolist(), torch.cat(targets)
    sampled = [k for k, kind in enumerate(kinds) if kind >= 0]  # 64 samples take in all of them
    assert score.item() == pytest.approx(sum(naive_bce(scores[k].item(), kinds[k]) for k in sampled) / 9)
    distance = sum(
        abs(float(a - b)) for k in sampled if kinds[k] == 1 for a, b in zip(deltas[k], wanted[k], strict=True)
    )
    assert box.item() == pytest.approx(distance / 9)


def test_without_positives_the_losses_are_finite_with_backward() -> None:
    scores, deltas, labels, targets = predictions()
    nothing = [torch.zeros_like(rows) for rows in labels]
    score, box = build().compute_loss(scores.requires_grad_(), deltas.requires_grad_(), nothing, targets)
    (score + box).backward()
    assert math.isfinite(score.item())
    assert box.item() == 0.0


def test_training_proposes_and_gives_both_losses() -> None:
    rpn = build().train()
    images, features = scene()
    boxes = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 38.0]])}, {"boxes": torch.zeros(0, 4)}]
    proposals, losses = rpn(images, features, boxes)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg"}
    assert [p.shape[1] for p in proposals] == [4, 4]
    assert all(len(p) <= 20 and not p.requires_grad for p in proposals)


def test_scored_proposals_are_those_of_forward_best_first() -> None:
    rpn = build().eval()
    images, features = scene()
    with torch.no_grad():
        forward, _ = rpn(images, features)
        scored = rpn.scored_proposals(images, features)
    for boxes, (same, scores), (height, width) in zip(forward, scored, images.image_sizes, strict=True):
        torch.testing.assert_close(same, boxes)
        assert len(scores) == len(same) > 0
        assert (scores.diff() <= 0).all()
        assert scores.min() > 0
        assert scores.max() < 1
        assert same.min() >= 0
        assert (same <= torch.tensor([width, height, width, height])).all()


def test_scores_belong_to_their_boxes() -> None:
    """With a score that follows from position alone, the best proposal lies where the score is highest."""
    rpn = build(pre_nms=1000).eval()
    images, features = scene(1)
    for layer in (rpn.head.conv[0][0], rpn.head.cls_logits, rpn.head.bbox_pred):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.dirac_(rpn.head.conv[0][0].weight)
    rpn.head.cls_logits.weight.data[:, 0] = 1.0
    for level in features.values():
        level.zero_()
    features["3"][0, 0, 5, 2] = 4.0  # cell (row 5, column 2) of stride 8
    with torch.no_grad():
        ((boxes, scores),) = rpn.scored_proposals(images, features)
    assert scores[0].item() == pytest.approx(1 / (1 + math.exp(-4.0)), abs=1e-6)
    best = boxes[scores > 0.9]
    anchors = torch.tensor(
        [
            [16.0 - w / 2, 40.0 - h / 2, 16.0 + w / 2, 40.0 + h / 2]
            for w, h in ((23.0, 11.0), (16.0, 16.0), (11.0, 23.0))
        ]
    ).clamp(min=0)  # 16 px at three aspect ratios
    assert box_iou(best, anchors).amax(dim=1).min() > 0.85  # torchvision rounds anchor corners


@pytest.mark.parametrize("sizes", [[[16]], [[16], [32], [64]]])
def test_one_list_of_anchor_sizes_a_level(sizes: list[list[int]]) -> None:
    with pytest.raises(HdovdError, match=rf"anchor_sizes.*{len(sizes)}.*2 feature levels"):
        build(anchor_sizes=sizes)


def test_levels_need_as_many_anchor_sizes_each() -> None:
    with pytest.raises(HdovdError, match="anchor_sizes"):
        build(anchor_sizes=[[16, 24], [32]])


def test_several_anchor_sizes_a_level() -> None:
    rpn = build(anchor_sizes=[[16, 24], [32, 48]]).eval()
    images, features = scene()
    with torch.no_grad():
        assert len(rpn(images, features)[0]) == 2


def test_scores_are_float32_under_autocast() -> None:
    rpn, (_, features) = build(), scene()
    with torch.autocast("cpu", torch.bfloat16):
        scores, deltas = rpn.head(list(features.values()))
    assert {t.dtype for t in [*scores, *deltas]} == {torch.float32}


def test_anchors_are_exact_under_autocast() -> None:
    """In bfloat16 whole numbers above 256 are rounded, by up to 4 at 1333 pixels."""
    rpn = build()
    maps = [torch.zeros(1, 4, 8, 1344 >> level) for level in (3, 4)]
    images = ImageList(torch.zeros(1, 3, 64, 1344), [(64, 1333)])
    exact = rpn.anchor_generator(images, maps)[0]
    low = rpn.anchor_generator(images, [m.bfloat16() for m in maps])[0]
    assert low.dtype == torch.float32
    assert torch.equal(low, exact)
