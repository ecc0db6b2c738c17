"""How often the host waits for a GPU in a training step, and that no operation mixes devices, on a GPU that is not
there.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import adamixer_scenes as adamixer
import faster_rcnn_scenes as faster_rcnn
import pytest
import rtdetr_scenes as rtdetr
import torch
from pretended_cuda import PretendedCuda
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import RpnConfig
from hdovd.config.recipe import PRESETS
from hdovd.data.targets import Targets
from hdovd.modeling import boxes as image_nms
from hdovd.modeling.base import Detector
from hdovd.modeling.rpn import build_rpn
from hdovd.pipelines.training.loop import build_optimizer

MOST_WAITS = {"rtdetr": 4}  # a step
Scene = tuple[Detector, list[Tensor], list[Targets], Tensor]


def rcnn_scene(images: int, *settings: str) -> Scene:
    """Pictures of two sizes; one has no base box, one no pseudo box."""
    base = [*faster_rcnn.BASE_BOXES, [], *faster_rcnn.BASE_BOXES[:1]]
    pseudo = [*faster_rcnn.PSEUDO_BOXES, *faster_rcnn.PSEUDO_BOXES[:1], []]
    pictures, targets = faster_rcnn.batch(base[:images], pseudo[:images])
    return faster_rcnn.detector(*settings).train(), [pictures[0][:, :60], *pictures[1:]], targets, faster_rcnn.TEXTS


def federated(scene: Scene) -> Scene:
    """Each picture is judged by every other class, and by those of its boxes."""
    model, images, targets, texts = scene
    known = [torch.arange(len(texts)) % 2 == 0 for _ in targets]
    for judged, own in zip(known, targets, strict=True):
        judged[own.labels] = True
    return model, images, [replace(t, judged=judged) for t, judged in zip(targets, known, strict=True)], texts


def query_scene(scenes: ModuleType, images: int, *settings: str) -> Scene:
    model = scenes.detector(*settings).train()
    model.begin_epoch(2)
    boxes, pictures = [[5.0, 5, 60, 60], [30, 20, 90, 70]], adamixer.pictures(*[(80, 120), (96, 96)] * (images // 2))
    targets = [
        adamixer.targets(boxes[n % 2 :], [[10.0, 10, 70, 70]] * (1 - n % 2), [0, 2][n % 2 :], n) for n in range(images)
    ]
    return model, pictures, targets, adamixer.unit(adamixer.BASE, adamixer.DIM, seed=50)


def train(scene: Scene, device: str, before_last: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Two steps as the training loop takes them, with the batch on the device. The losses and gradients of the
    first."""
    model, images, targets, texts = scene
    model.to(device)
    images, targets, texts = [image.to(device) for image in images], [t.to(device) for t in targets], texts.to(device)
    optimizer = build_optimizer(model, model.recipe.train)
    found: list[Tensor] = []
    for turn in range(2):
        optimizer.zero_grad()
        losses = model(images, targets, texts, [7 * turn + n for n in range(len(images))])
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not turn:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found = [value.detach().cpu().clone() for value in (*losses.values(), *gradients)]
        optimizer.step()
        if not turn:
            before_last()
    return found


SCENES = {
    "faster_rcnn": rcnn_scene,
    "authors' rpn": lambda n: rcnn_scene(n, 'detector.rpn.rules="authors"'),
    "base-only": lambda n: rcnn_scene(n, *PRESETS["base-only"]),
    "adamixer": lambda n: query_scene(adamixer, n),
    "rtdetr": lambda n: query_scene(rtdetr, n),
    "faster_rcnn, federated": lambda n: federated(rcnn_scene(n, "loss.class.federated=true")),
    "adamixer, federated": lambda n: federated(query_scene(adamixer, n, "loss.class.federated=true")),
}


@pytest.mark.parametrize("name", SCENES)
def test_a_training_step_waits_as_seldom_for_four_pictures_as_for_two(name: str) -> None:
    waits = []
    for images in (2, 4):
        expected = train(SCENES[name](images), "cpu")
        with PretendedCuda() as cuda:
            found = train(SCENES[name](images), "cuda", cuda.forget)
            waits.append(cuda.waits.total())
            print(
                f"{name}, {images} pictures: {waits[-1]} waits, {cuda.uploads.total()} copies to the device that are "
                f"waited for"
            )
        assert not cuda.mixed
        assert not cuda.uploads
        assert not cuda.on_host
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert 0 < waits[0] == waits[1] <= MOST_WAITS.get(name, 10)


# What a GPU does otherwise than a CPU.


@pytest.mark.parametrize("most", [1, 150, 2**15])
def test_proposals_of_all_images_together_are_those_of_each(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_nms, "MOST_AT_ONCE", most)
    torch.manual_seed(0)
    rpn = build_rpn(RpnConfig(anchor_sizes=[[16], [32]], samples=64, pre_nms=50, post_nms=20, nms=0.5), 4, 2).train()
    features = {str(level): 3 * torch.randn(3, 4, 64 >> level, 64 >> level) for level in (3, 4)}
    images = ImageList(
        torch.zeros(3, 3, 64, 64), [(64, 64), (50, 60), (1, 33)]
    )  # of the last picture no box may be left
    rpn.min_size = 2.0
    found = [rpn.scored_proposals(images, features)]
    with PretendedCuda() as cuda:
        rpn.to("cuda")
        images.tensors, features = (
            images.tensors.to("cuda"),
            {level: maps.to("cuda") for level, maps in features.items()},
        )
        kept = rpn.scored_proposals(images, features)
        found.append([(boxes.cpu(), scores.cpu()) for boxes, scores in kept])
    assert [len(boxes) for boxes, _ in found[0]] == [20, 20, 0]
    torch.testing.assert_close(found[1], found[0])
    assert not cuda.mixed


def test_boxes_of_another_image_drop_none() -> None:
    """Far from the origin, on both sides of it."""
    generator = torch.Generator().manual_seed(1)
    corners = 100 * torch.rand(4, 60, 2, generator=generator) - torch.tensor([9000.0, -9000.0])
    boxes = torch.cat([corners, corners + 30], dim=2)
    scores = torch.rand(4, 60, generator=generator)
    group = (torch.arange(60) >= 25).long().expand(4, 60)
    expected = image_nms.nms_of_images(boxes, scores, 0.3, group).sort().values
    with PretendedCuda():
        on_device = (boxes.to("cuda"), scores.to("cuda"), 0.3, group.to("cuda"))
        kept = image_nms.nms_of_images(*on_device).sort().values.cpu()
    assert torch.equal(kept, expected)
    assert 0 < len(kept) < scores.numel()


# The pretended device itself.


def test_a_gpu_would_refuse_what_mixes_devices() -> None:
    with PretendedCuda() as cuda:
        row, on_host = torch.ones(3, device="cuda"), torch.ones(3)
        _ = row + torch.tensor(2.0)  # a number may lie anywhere
        assert not cuda.mixed
        _ = row + on_host
        row[:] = torch.zeros(3)  # a copy
        _ = torch.zeros(3)[torch.ones(3, dtype=torch.bool, device="cuda")]
    assert len(cuda.mixed) == 2


def test_every_wait_is_counted() -> None:
    with PretendedCuda() as cuda:
        row = torch.arange(4.0).to("cuda")
        mask = row > 1
        free = [
            row.sum(),
            row.topk(2),
            row.masked_fill(mask, 0.0),
            row[torch.zeros(2, dtype=torch.int64, device="cuda")],
        ]
        row[mask] = 5.0
        assert (free[0].device.type, cuda.waits.total()) == ("cuda", 0)
        for number, wait in enumerate(
            (
                lambda: row[mask],
                lambda: row[mask].tolist(),
                lambda: mask.nonzero(),
                lambda: float(row[0]),
                lambda: bool(mask.any()),
                lambda: row.cpu(),
                lambda: torch.bincount(mask.long()),
            ),
            1,
        ):
            wait()
            assert cuda.waits.total() == number + (number > 1)  # the list's takes two
        cuda.forget()
        torch.tensor([1.0, 2.0], device="cuda")
        torch.ones(2).to("cuda", non_blocking=True)
        assert (cuda.uploads.total(), cuda.waits.total()) == (1, 0)


def test_gradients_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    pictures = torch.randn(2, 3, 8, 8)

    def loss(device: str) -> Tensor:
        rows = model(pictures.to(device))
        return (rows.softmax(dim=1) * rows[:1]).sum() + rows.square().mean()

    loss("cpu").backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with PretendedCuda():
        model.to("cuda")
        loss("cuda").backward()
        found = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected)
