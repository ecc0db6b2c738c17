"""A small Faster R-CNN, batches for it, and a step of it."""

from __future__ import annotations

import torch
from torch import Tensor

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.data.targets import Targets
from hdovd.modeling.faster_rcnn.model import FasterRCNN

DIM, BASE_COUNT = 6, 3
SMALL = (
    "input.short_side=64",
    "input.long_side=96",
    "detector.backbone.fpn_channels=8",
    "detector.rpn.anchor_sizes=[[8], [16], [32], [64]]",
    "detector.rpn.samples=16",
    "detector.rpn.pre_nms=30",
    "detector.rpn.post_nms=20",
    "detector.head.fc_channels=16",
    "detector.head.samples=32",
    "detector.head.positive_share=0.5",
    "detector.head.canonical_size=32",
    "loss.instance.queue=7",
    "loss.image.queue=5",
    "pseudo_boxes.min_side=8.0",
    "pseudo_boxes.max_per_image=2",
    "pseudo_boxes.reliability_centre=0.1",
    "pseudo_boxes.reliability_width=0.5",
    "pseudo_boxes.reliability_scale=1.3",
    "train.precision=fp32",
)
DISTILLED = {
    "rpn_objectness",
    "rpn_box",
    "classification",
    "box",
    "instance_alignment",
    "instance_relation",
    "image_alignment",
}
BASE_ONLY = {"rpn_objectness", "rpn_box", "classification", "box"}


def small(*settings: str) -> Recipe:
    return load_recipe("demo", [*SMALL, *settings])


def detector(*settings: str) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(small(*settings), DIM)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(noise(*shape, seed=seed), dim=-1)


def pictures(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]


BASE_BOXES = [[[4.0, 4.0, 30.0, 28.0], [40.0, 10.0, 80.0, 60.0]], [[10.0, 20.0, 60.0, 50.0]]]
PSEUDO_BOXES = [
    [[20.0, 30.0, 40.0, 58.0]],
    [[5.0, 5.0, 25.0, 20.0], [64.0, 2.0, 70.0, 40.0], [60.0, 30.0, 90.0, 60.0]],
]  # 2nd: 6 px wide


def targets_of(base: list[list[float]], pseudo: list[list[float]], seed: int) -> Targets:
    labels = torch.arange(seed, seed + len(base)) % BASE_COUNT
    return Targets(
        torch.tensor(base).reshape(-1, 4),
        labels,
        unit(len(base), DIM, seed=100 + seed),
        torch.tensor(pseudo).reshape(-1, 4),
        unit(len(pseudo), DIM, seed=200 + seed),
        unit(len(pseudo), DIM, seed=300 + seed),
        unit(DIM, seed=400 + seed),
    )


def batch(
    base: list[list[list[float]]] = BASE_BOXES, pseudo: list[list[list[float]]] = PSEUDO_BOXES, seed: int = 0
) -> tuple[list[Tensor], list[Targets]]:
    images = pictures(*[(64, 96)] * len(base), seed=seed)
    return images, [targets_of(b, p, 10 * seed + i) for i, (b, p) in enumerate(zip(base, pseudo, strict=True))]


TEXTS = unit(BASE_COUNT, DIM, seed=9)


def run(model: FasterRCNN, images: list[Tensor], targets: list[Targets], seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    losses: dict[str, Tensor] = model.train()(images, targets, TEXTS)
    return losses


def check_backward(model: FasterRCNN, losses: dict[str, Tensor]) -> None:
    model.zero_grad()
    assert all(loss.isfinite() and loss.shape == () for loss in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
