"""RT-DETR's recipes, and its scores, which need no NMS."""

import pytest
import torch
from adamixer_scenes import DIM, pictures, unit
from rtdetr_scenes import detector, small

from hdovd.core import HdovdError
from hdovd.modeling.base import Regions
from hdovd.modeling.batching import batch_images
from hdovd.modeling.boxes import detect


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("detector.backbone.fpn_channels=48", r"fpn_channels = 48 must be a multiple of 32"),
        ("detector.encoder.hidden=48", r"encoder\.hidden = 48 must be a multiple of 32"),
        ("detector.encoder.heads=5", r"multiple of 5 \(encoder\.heads\)"),
        ("detector.decoder.heads=5", r"multiple of 5 \(decoder\.heads\)"),
        ("detector.denoising.queries=-1", "denoising.queries"),
    ],
)
def test_recipes_that_do_not_fit(setting: str, word: str) -> None:
    with pytest.raises(HdovdError, match=word):
        small(setting)


def test_both_scores_are_times_the_objectness() -> None:
    model, texts = detector().eval(), unit(7, DIM, seed=2)
    with torch.no_grad():
        look = model.find(batch_images(pictures((96, 128)), model.recipe.input)[0])
        sure = model.stage(-1).object_logits(look.contents[-1])[0].sigmoid()
    found = model.predict(pictures((96, 128)), texts)[0]
    torch.testing.assert_close(found.distillation_score.sum(dim=1), sure)
    model.certainty = lambda _: None
    plain = model.predict(pictures((96, 128)), texts)[0]
    torch.testing.assert_close(found.class_probability[:, :7], plain.class_probability[:, :7] * sure[:, None])


def test_what_classes_lose_is_the_backgrounds() -> None:
    model, found = detector(), Regions(torch.zeros(1, 4), torch.zeros(1, DIM), None, [1], torch.tensor([0.5]))
    model.scores = lambda *_: (torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.4]]))
    first, second = model.region_scores(found, torch.zeros(2, DIM))
    torch.testing.assert_close(first, torch.tensor([[0.25, 0.15, 0.6]]))
    torch.testing.assert_close(second, torch.tensor([[0.3, 0.2]]))


def test_boxes_on_each_other_are_all_found() -> None:
    """There is no NMS, and as many are found as are asked for."""
    model = detector("inference.score_threshold=0.0", "inference.detections_per_image=30").eval()
    for stage in model.network.stages:
        torch.nn.init.zeros_(stage.deltas[-1].weight)
        torch.nn.init.constant_(stage.deltas[-1].bias, 9.0)
    found = detect(
        model.predict(pictures((96, 128)), unit(7, DIM, seed=2))[0], torch.arange(7) > 4, model.recipe.inference
    )
    assert len(found.scores) == 30
    assert (found.boxes - found.boxes[:1]).abs().max() < 1.0
    assert bool((found.scores.diff() <= 0).all())


def test_without_denoising() -> None:
    model = detector("detector.denoising.queries=0")
    assert not [name for name in model.state_dict() if name.startswith("denoising.")]
