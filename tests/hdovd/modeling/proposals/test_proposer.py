"""The class-agnostic proposal networks: losses with backward, and proposals in the pixels of the original image."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from hdovd.config.recipe import load_recipe
from hdovd.modeling.batching import batch_images
from hdovd.modeling.proposals.networks import ObjectLocalisationNetwork, ObjectnessNetwork, ProposalNetwork

RECIPE = load_recipe(
    "demo",
    [
        "input.short_side=64",
        "input.long_side=96",
        "detector.backbone.fpn_channels=8",
        "detector.rpn.anchor_sizes=[[16], [32], [64], [96]]",
        "detector.rpn.samples=32",
        "detector.rpn.pre_nms=40",
        "detector.rpn.post_nms=20",
        "detector.head.fc_channels=16",
        "proposals.rois=30",
        "proposals.nms=0.2",
    ],
)
NETWORKS = {
    ObjectLocalisationNetwork: {"rpn_centerness", "rpn_box", "head_iou", "head_box"},
    ObjectnessNetwork: {"objectness", "box"},
}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]


def network(kind: type[ProposalNetwork]) -> ProposalNetwork:
    torch.manual_seed(0)
    return kind(RECIPE)


@each_network
def test_losses_are_finite_and_every_weight_learns(kind: type[ProposalNetwork]) -> None:
    model = network(kind).train()
    losses = model(
        pictures((64, 96), (32, 40)), [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([[2.0, 2.0, 20.0, 25.0]])]
    )
    sum(losses.values()).backward()
    assert set(losses) == NETWORKS[kind]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@each_network
def test_boxes_are_scaled_like_the_picture(kind: type[ProposalNetwork]) -> None:
    model, (picture,) = network(kind).train(), pictures((32, 48))
    box = torch.tensor([[4.0, 4.0, 28.0, 20.0]])
    double = (
        torch.nn.functional.interpolate(picture[None].float(), (64, 96), mode="bilinear", align_corners=False)[0]
        .round()
        .byte()
    )
    torch.manual_seed(1)
    small = model([picture], [box])
    torch.manual_seed(1)
    large = model([double], [2 * box])
    for name in small:
        torch.testing.assert_close(
            small[name], large[name], atol=0.02, rtol=0.02
        )  # the doubled picture is rounded to bytes


@each_network
def test_training_scales_are_drawn_and_boxes_follow(kind: type[ProposalNetwork]) -> None:
    torch.manual_seed(0)
    recipe = RECIPE.model_copy(update={"input": RECIPE.input.model_copy(update={"train_short_sides": [32, 64]})})
    model, seen = kind(recipe).train(), []
    model.rpn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model(pictures(*[(64, 96)] * 8), [torch.tensor([[8.0, 16.0, 40.0, 40.0]])] * 8)
    ((batch, _, targets),) = seen
    assert set(batch.image_sizes) == {(64, 96), (32, 48)}
    for (height, _), target in zip(batch.image_sizes, targets, strict=True):
        assert target["boxes"].tolist() == [[v * height / 64 for v in (8.0, 16.0, 40.0, 40.0)]]


@each_network
def test_proposals_come_best_first_in_original_pixels(kind: type[ProposalNetwork]) -> None:
    model, images = network(kind).eval(), pictures((32, 40), (128, 180))
    found = model.propose(images)
    batch, factors = batch_images(images, RECIPE.input)
    with torch.no_grad():
        expected = model.scored(batch, model.backbone(batch.tensors))
    for (boxes, scores), image, (x, y), (padded, same) in zip(found, images, factors, expected, strict=True):
        assert len(boxes) == len(scores) > 0
        assert (scores.diff() <= 0).all()
        keep = nms(padded, same, 0.2)
        assert 0 < len(keep) < len(padded)
        padded, same = padded[keep], same[keep]
        torch.testing.assert_close(scores, same)
        assert (box_iou(padded, padded).triu(1) <= 0.2).all()
        torch.testing.assert_close(
            boxes, torch.stack([padded[:, 0] / x, padded[:, 1] / y, padded[:, 2] / x, padded[:, 3] / y], dim=1)
        )
        assert (boxes <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
        assert boxes.min() >= 0


@each_network
def test_pictures_without_boxes_teach_with_backward(kind: type[ProposalNetwork]) -> None:
    """And every weight has a gradient, which data-parallel training waits for."""
    model = network(kind).train()
    losses = model(pictures((64, 96), (32, 40)), [torch.zeros(0, 4)] * 2)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@each_network
def test_with_keys_nothing_is_left_to_chance(kind: type[ProposalNetwork]) -> None:
    recipe = load_recipe(
        "demo", ["input.short_side=64", "input.long_side=96", "detector.rpn.samples=6", "detector.head.samples=2"]
    )
    torch.manual_seed(0)
    model, images = kind(recipe).train(), pictures((64, 96), (64, 96))
    boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 4.0, 80.0, 60.0]])] * 2

    def losses(*keys: int) -> list[float]:
        return [loss.item() for loss in model(images, boxes, keys).values()]

    assert losses(3, 4) == losses(3, 4)
    assert losses(3, 4) != losses(3, 5)
