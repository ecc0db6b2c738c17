"""The class-agnostic proposal network: losses with backward, and proposals in the pixels of the original image."""

import torch
from torch import Tensor

from hdovd.batching import batch_images
from hdovd.config import load_recipe
from hdovd.proposer import ProposalNetwork

RECIPE = load_recipe("demo", [
    "input.short_side=64", "input.long_side=96", "detector.backbone.fpn_channels=8", "detector.rpn.anchor_sizes=[[8], [16], [32], [64]]",
    "detector.rpn.samples=32", "detector.rpn.pre_nms=40", "detector.rpn.post_nms=20"])


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]


def network() -> ProposalNetwork:
    torch.manual_seed(0)
    return ProposalNetwork(RECIPE, lambda _: None)


def test_losses_are_finite_and_every_weight_learns() -> None:
    model = network().train()
    losses = model(pictures((64, 96), (32, 40)), [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([[2.0, 2.0, 20.0, 25.0]])])
    sum(losses.values()).backward()
    assert set(losses) == {"score", "box"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_boxes_are_scaled_like_the_picture() -> None:
    model, (picture,) = network().train(), pictures((32, 48))
    box = torch.tensor([[4.0, 4.0, 28.0, 20.0]])
    double = torch.nn.functional.interpolate(picture[None].float(), (64, 96), mode="bilinear", align_corners=False)[0].round().byte()
    torch.manual_seed(1)
    small = model([picture], [box])
    torch.manual_seed(1)
    large = model([double], [2 * box])
    for name in small:
        torch.testing.assert_close(small[name], large[name], atol=0.02, rtol=0.02)  # the doubled picture is rounded to bytes


def test_training_scales_are_drawn_and_boxes_follow() -> None:
    torch.manual_seed(0)
    recipe = RECIPE.model_copy(update={"input": RECIPE.input.model_copy(update={"train_short_sides": [32, 64]})})
    model, seen = ProposalNetwork(recipe, lambda _: None).train(), []
    model.rpn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model(pictures(*[(64, 96)] * 8), [torch.tensor([[8.0, 16.0, 40.0, 40.0]])] * 8)
    (batch, _, targets), = seen
    assert set(batch.image_sizes) == {(64, 96), (32, 48)}
    for (height, _), target in zip(batch.image_sizes, targets, strict=True):
        assert target["boxes"].tolist() == [[v * height / 64 for v in (8.0, 16.0, 40.0, 40.0)]]


def test_proposals_come_best_first_in_original_pixels() -> None:
    model, images = network().eval(), pictures((32, 40), (128, 180))
    found = model.propose(images)
    batch, factors = batch_images(images, RECIPE.input)
    with torch.no_grad():
        expected = model.rpn.scored_proposals(batch, model.backbone(batch.tensors))
    for (boxes, scores), image, (x, y), (padded, same) in zip(found, images, factors, expected, strict=True):
        assert len(boxes) == len(scores) > 0
        assert (scores.diff() <= 0).all()
        torch.testing.assert_close(scores, same)
        torch.testing.assert_close(boxes, torch.stack([padded[:, 0] / x, padded[:, 1] / y, padded[:, 2] / x, padded[:, 3] / y], dim=1))
        assert (boxes <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
        assert boxes.min() >= 0
