"""The detector that can be traced finds what `predict` and `detect` find."""

from __future__ import annotations

import pytest
import torch
from detections_alike import require_alike
from torch import Tensor
from torchvision.ops import nms

from hdovd.config.recipe import PRESETS, InferenceConfig, load_recipe
from hdovd.modeling.base import RoIPredictions
from hdovd.modeling.boxes import Detections, detect, nms_of_parts
from hdovd.modeling.export.detectors import ExportableDetector
from hdovd.modeling.faster_rcnn.model import FasterRCNN

DIM = 6
SMALL = (
    "input.short_side=64",
    "input.long_side=96",
    "detector.backbone.fpn_channels=8",
    "detector.rpn.post_nms=20",
    "detector.head.fc_channels=16",
    "detector.head.canonical_size=32",
    "detector.rpn.anchor_sizes=[[8], [16], [32], [64]]",
    "detector.head.logit_scale=8.0",
)  # so low that no two scores are both 1
SIZES = [
    (64, 80),
    (37, 91),
    (300, 40),
    (7, 5),
    (64, 64),
]  # height, width; as it comes, odd, capped by the long side, enlarged


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def detector(*settings: str) -> FasterRCNN:
    """A random one whose proposals differ in score, place and level."""
    torch.manual_seed(0)
    model = FasterRCNN(load_recipe("demo", [*SMALL, *settings]), DIM)
    for layer, std in (
        (model.rpn.head.cls_logits, 0.5),
        (model.rpn.head.bbox_pred, 0.2),
        (model.head.deltas, 0.1),
        (model.head.class_feature, 0.3),
    ):
        torch.nn.init.normal_(layer.weight, std=std)
    return model.eval()


def same(model: FasterRCNN, image: Tensor, texts: Tensor, is_novel: Tensor) -> int:
    """Asserts that both find the same; how many they find."""
    expected = detect(model.predict([image], texts)[0], is_novel, model.recipe.inference)
    with torch.inference_mode():
        found = Detections(*ExportableDetector(model)(image, texts, is_novel))
    require_alike(found, expected, pixels=1e-4, score=1e-5)
    return len(found.labels)


@pytest.mark.parametrize("settings", [(), PRESETS["base-only"]], ids=["both scores", "one score"])
@pytest.mark.parametrize("size", SIZES)
def test_it_finds_what_the_model_finds(size: tuple[int, int], settings: tuple[str, ...]) -> None:
    model = detector(*settings)
    for classes in (1, 4, 70):
        found = same(model, picture(*size), noise(classes, DIM, seed=classes), torch.arange(classes) % 3 == 1)
        assert found > 0


@pytest.mark.parametrize("side", [64, 256])
def test_proposals_of_few_anchors_and_of_many(side: int) -> None:
    """torchvision's NMS goes another way from 1000 boxes on."""
    model = detector(
        f"input.short_side={side}", "input.long_side=400", "detector.rpn.pre_nms=1400", "detector.rpn.post_nms=300"
    )
    assert same(model, picture(60, 75), noise(5, DIM, seed=1), torch.zeros(5, dtype=torch.bool)) > 0


def test_nothing_found() -> None:
    assert (
        same(
            detector("inference.score_threshold=1.0"),
            picture(50, 60),
            noise(3, DIM, seed=0),
            torch.tensor([True, False, True]),
        )
        == 0
    )


def test_no_proposals() -> None:
    model = detector()
    torch.nn.init.constant_(model.rpn.head.bbox_pred.bias, -60.0)  # all of them vanish
    assert same(model, picture(50, 60), noise(3, DIM, seed=0), torch.tensor([True, False, True])) == 0


def test_the_novel_classes_are_asked_for() -> None:
    model, texts = detector(), noise(4, DIM, seed=3)
    with torch.inference_mode():
        one, other = (
            ExportableDetector(model)(picture(60, 60), texts, torch.full((4,), novel)) for novel in (False, True)
        )
    assert one[1][:5].tolist() != other[1][:5].tolist()


def test_the_training_mode_of_the_model_does_not_matter() -> None:
    model = detector()
    assert not ExportableDetector(model.train()).training
    assert not model.training


@pytest.mark.parametrize("classes", [3, 1500])
def test_suppression_is_exact_with_any_number_of_classes(classes: int) -> None:
    """By hand, class by class. In a picture of 1300 pixels, boxes whose IoU is within 0.01 of the threshold on either
    side.
    """
    rows = torch.arange(classes)
    first = torch.stack([1250.0 + rows % 40, rows % 1200, 1262.0 + rows % 40, rows % 1200 + 10], dim=1)
    shift = torch.where(rows % 2 == 0, 4.04, 3.94)  # IoU (12 - shift) / (12 + shift): 0.496 and 0.506
    second = first + torch.stack([-shift, 0 * shift, -shift, 0 * shift], dim=1)
    boxes = torch.cat([first, second])
    scores = torch.zeros(2 * classes, classes)
    scores[rows, rows], scores[classes + rows, rows] = 0.9 - rows / 1e5, 0.5 - rows / 1e5
    expected = set()
    for label in range(classes):
        pair = torch.tensor([label, classes + label])
        expected |= {(int(pair[k]), label) for k in nms(boxes[pair], scores[pair, label], 0.5)}
    assert len(expected) == classes + (classes + 1) // 2
    candidates = (scores > 0.05).nonzero()
    roi, label = candidates.unbind(1)
    kept = nms_of_parts(boxes[roi], scores[roi, label], label, 0.5)
    assert set(map(tuple, candidates[kept].tolist())) == expected
    config = InferenceConfig(
        alpha=0.0, beta=0.0, distillation_scale=20.0, score_threshold=0.05, nms=0.5, detections_per_image=9999
    )
    probability = torch.cat([scores, torch.zeros(2 * classes, 1)], dim=1)
    half = (
        slice(None) if classes < 400 else torch.cat([rows[-400:], classes + rows[-400:]])
    )  # torchvision shifts below 1000 candidates
    found = detect(RoIPredictions(boxes[half], probability[half], None), torch.zeros(classes, dtype=torch.bool), config)
    places = torch.arange(2 * classes)[half].tolist()
    assert sorted(found.labels.tolist()) == sorted(label for place, label in expected if place in set(places))


def test_suppression_of_nothing() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert nms_of_parts(torch.zeros(0, 4), torch.zeros(0), nothing, 0.5).shape == (0,)
