"""The student embeddings that are shown are those that the instance level learns from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hdovd.config.recipe import load_recipe
from hdovd.data.targets import Targets
from hdovd.modeling.faster_rcnn.model import FasterRCNN

SMALL = (
    "detector.backbone.fpn_channels=16",
    "detector.rpn.samples=32",
    "detector.rpn.pre_nms=60",
    "detector.rpn.post_nms=30",
    "detector.head.fc_channels=16",
    "detector.head.samples=16",
    "input.short_side=64",
    "input.long_side=96",
    "pseudo_boxes.min_side=4.0",
    "pseudo_boxes.max_per_image=1",
    "pseudo_boxes.reliability_centre=0.0",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
)
D = 8


def _model(*settings: str) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN(load_recipe("demo", [*SMALL, *settings]), D, initialise=False).eval()


def _rows(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, D), dim=1)


def _batch() -> tuple[list[torch.Tensor], list[Targets]]:
    torch.manual_seed(1)
    images = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0], [34.0, 30.0, 60.0, 60.0]])
    pseudo = torch.tensor([[10.0, 30.0, 30.0, 62.0], [1.0, 1.0, 20.0, 20.0]])
    return images, [
        Targets(boxes, torch.tensor([0, 1]), _rows(2), pseudo, _rows(2), _rows(2), _rows(1)[0]) for _ in images
    ]


def test_students_are_the_normalised_rows_of_the_boxes_that_are_used() -> None:
    model = _model()
    images, targets = _batch()
    found = model.students(images, targets, [5, 6])
    assert found.box.tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]  # two base boxes and the one pseudo box that the recipe allows, an image
    assert [len(t.pseudo_boxes) for t in found.targets] == [1, 1]
    assert found.q.shape == (6, D)
    torch.testing.assert_close(found.q.norm(dim=1), torch.ones(6))


def test_students_change_nothing_and_come_out_the_same_again() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = _batch()
    one, two = (model.students(images, targets, [5, 6]).q for _ in range(2))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_instance_level_learns_from_the_same_rows() -> None:
    """In training it pushes its students into its memory, newest first."""
    model = _model("detector.backbone.norm=frozen")
    images, targets = _batch()
    model.train()
    proposals = model.recipe.detector.rpn.post_nms
    model.rpn._pre_nms_top_n["testing"] = model.rpn._pre_nms_top_n["training"]  # as many proposals in both modes
    model.rpn._post_nms_top_n["testing"] = proposals
    model(images, targets, _rows(3), [5, 6])
    pushed = model.instance_level.student_queue.read()[:6]  # type: ignore[union-attr]
    shown = model.eval().students(images, targets, [5, 6]).q
    torch.testing.assert_close(pushed, shown, rtol=1e-4, atol=1e-5)


def test_without_the_instance_level_there_are_none() -> None:
    images, targets = _batch()
    with pytest.raises(ValueError, match="without the instance level"):
        _model("loss.instance.enabled=false").students(images, targets)
