"""From RoI scores to detections (METHOD section 7)."""

import math

import pytest
import torch
from torch import Tensor

from hdovd.config.recipe import InferenceConfig
from hdovd.modeling.base import RoIPredictions
from hdovd.modeling.boxes import combine_scores, detect, detect_batch

CONFIG = InferenceConfig(
    alpha=0.25, beta=0.45, distillation_scale=20.0, score_threshold=0.05, nms=0.5, detections_per_image=100
)
NOVEL = torch.tensor([False, False, True])


def scores(rois: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        (3 * torch.randn(rois, classes + 1, generator=generator)).softmax(dim=1),
        (3 * torch.randn(rois, classes, generator=generator)).sigmoid(),
    )


def test_combination_by_hand() -> None:
    s1, s2 = torch.tensor([[0.4, 0.1, 0.3, 0.2]]), torch.tensor([[0.9, 0.5, 0.7]])
    parts = [0.4**0.75 * 0.9**0.25, 0.1**0.75 * 0.5**0.25, 0.3**0.55 * 0.7**0.45, 0.2]
    expected = torch.tensor([[p / sum(parts) for p in parts]])
    torch.testing.assert_close(combine_scores(s1, s2, NOVEL, 0.25, 0.45), expected, atol=1e-6, rtol=0)


def test_combination_equals_a_loop_and_rows_sum_to_one() -> None:
    s1, s2 = scores(6)
    combined = combine_scores(s1, s2, NOVEL, 0.35, 0.65)
    for one, two, row in zip(s1.tolist(), s2.tolist(), combined, strict=True):
        parts = [one[k] ** (1 - share) * two[k] ** share for k, share in enumerate((0.35, 0.35, 0.65))] + [one[3]]
        torch.testing.assert_close(row, torch.tensor([p / sum(parts) for p in parts]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(combined.sum(dim=1), torch.ones(6))


def test_zero_exponents_leave_the_classifier_alone() -> None:
    s1, s2 = scores(5)
    torch.testing.assert_close(combine_scores(s1, s2, NOVEL, 0.0, 0.0), s1, atol=1e-6, rtol=0)


def test_combination_survives_scores_of_zero() -> None:
    s1, s2 = (
        torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.0, 0.0]]),
    )
    for alpha, beta in ((0.25, 0.45), (0.0, 0.0), (1.0, 1.0)):
        assert combine_scores(s1, s2, NOVEL, alpha, beta).isfinite().all()


def test_combination_of_no_rois() -> None:
    assert combine_scores(torch.zeros(0, 4), torch.zeros(0, 3), NOVEL, 0.25, 0.45).shape == (0, 4)


def predictions(boxes: list[list[float]], s1: list[list[float]], s2: list[list[float]] | None = None) -> RoIPredictions:
    return RoIPredictions(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(s1).reshape(len(boxes), 4),
        None if s2 is None else torch.tensor(s2).reshape(len(boxes), 3),
    )


FAR = [[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0]]
OVERLAPPING = [
    [0.0, 0.0, 10.0, 10.0],
    [0.0, 1.0, 10.0, 11.0],
    [0.0, 6.0, 10.0, 16.0],
]  # IoU 0.82 and 0.25 with the first


def test_threshold_is_exclusive_and_background_is_no_detection() -> None:
    found = detect(
        predictions(FAR, [[0.25, 0.0625, 0.0, 0.6875], [0.0, 0.0, 0.125, 0.875]]),
        NOVEL,
        CONFIG.model_copy(update={"score_threshold": 0.0625}),
    )
    assert found.labels.tolist() == [0, 2]
    assert found.scores.tolist() == [0.25, 0.125]
    assert found.boxes.tolist() == FAR


def test_one_roi_can_be_of_several_classes() -> None:
    found = detect(predictions(FAR[:1], [[0.3, 0.4, 0.2, 0.1]]), NOVEL, CONFIG)
    assert found.labels.tolist() == [1, 0, 2]
    assert found.boxes.tolist() == FAR[:1] * 3


def test_suppression_is_within_a_class() -> None:
    found = detect(
        predictions(OVERLAPPING, [[0.6, 0.0, 0.0, 0.4], [0.7, 0.0, 0.0, 0.3], [0.5, 0.0, 0.0, 0.5]]), NOVEL, CONFIG
    )
    assert found.scores.tolist() == pytest.approx([0.7, 0.5])
    assert found.boxes.tolist() == [OVERLAPPING[1], OVERLAPPING[2]]
    found = detect(predictions(OVERLAPPING[:2], [[0.6, 0.0, 0.0, 0.4], [0.0, 0.7, 0.0, 0.3]]), NOVEL, CONFIG)
    assert found.labels.tolist() == [1, 0]


def test_the_cap_keeps_the_best() -> None:
    boxes = [[20.0 * k, 0.0, 20.0 * k + 10, 10.0] for k in range(6)]
    rows = [[0.1 * (k + 1), 0.0, 0.0, 1 - 0.1 * (k + 1)] for k in range(6)]
    found = detect(predictions(boxes, rows), NOVEL, CONFIG.model_copy(update={"detections_per_image": 2}))
    assert found.scores.tolist() == pytest.approx([0.6, 0.5])
    assert found.boxes.tolist() == [boxes[5], boxes[4]]


def test_combined_scores_are_used_unless_split_blind() -> None:
    s1, s2 = [[0.3, 0.1, 0.2, 0.4]], [[0.01, 0.9, 0.95]]
    parts = [0.3**0.75 * 0.01**0.25, 0.1**0.75 * 0.9**0.25, 0.2**0.55 * 0.95**0.45, 0.4]
    combined = detect(predictions(FAR[:1], s1, s2), NOVEL, CONFIG)
    assert combined.labels.tolist() == [2, 1, 0]
    assert combined.scores.tolist() == pytest.approx([parts[k] / sum(parts) for k in (2, 1, 0)])
    blind = detect(predictions(FAR[:1], s1, s2), NOVEL, CONFIG, split_blind=True)
    assert blind.labels.tolist() == [0, 2, 1]
    assert blind.scores.tolist() == pytest.approx([0.3, 0.2, 0.1])


@pytest.mark.parametrize("with_distillation", [True, False])
@pytest.mark.parametrize("rois", [0, 2])
def test_nothing_found(rois: int, with_distillation: bool) -> None:
    found = detect(
        predictions(FAR[:rois], [[0.0, 0.0, 0.0, 1.0]] * rois, [[0.5] * 3] * rois if with_distillation else None),
        NOVEL,
        CONFIG,
    )
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == (0,)
    assert found.labels.shape == (0,)
    assert found.labels.dtype == torch.int64


def test_a_confident_background_stays_background() -> None:
    s1 = torch.tensor([[1e-6, 1e-6, 1e-6, 1 - 3e-6]])
    combined = combine_scores(s1, torch.ones(1, 3), NOVEL, 0.25, 0.45)
    assert combined[0, 3].item() > 0.99
    assert math.isclose(combined[0, 2].item(), 1e-6**0.55, rel_tol=0.01)


@pytest.mark.parametrize("split_blind", [False, True])
@pytest.mark.parametrize("with_distillation", [True, False])
def test_a_batch_is_its_images_one_by_one(with_distillation: bool, split_blind: bool) -> None:
    """Images of many RoIs, of none, and of some that are all background."""
    batch = []
    for number, rois in enumerate((40, 0, 7, 25, 0)):
        s1, s2 = scores(rois, seed=number)
        if rois == 7:
            s1 = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(7, 4)
        corner = 30 * torch.rand(rois, 2, generator=torch.Generator().manual_seed(number))
        batch.append(RoIPredictions(torch.cat([corner, corner + 12], dim=1), s1, s2 if with_distillation else None))
    found = detect_batch(batch, NOVEL, CONFIG, split_blind=split_blind)
    assert [len(f.scores) > 0 for f in found] == [True, False, False, True, False]
    for one, predictions in zip(found, batch, strict=True):
        alone = detect(predictions, NOVEL, CONFIG, split_blind=split_blind)
        assert torch.equal(one.boxes, alone.boxes)
        assert torch.equal(one.scores, alone.scores)
        assert torch.equal(one.labels, alone.labels)


def test_a_threshold_of_one_is_no_nms() -> None:
    """Of equal boxes too, and of equal scores the first comes first."""
    rows = [[0.6, 0.0, 0.0, 0.4], [0.7, 0.0, 0.0, 0.3], [0.6, 0.0, 0.0, 0.4]]
    found = detect(predictions([OVERLAPPING[0]] * 3, rows), NOVEL, CONFIG.model_copy(update={"nms": 1.0}))
    assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.6])
    boxes = [OVERLAPPING[0], OVERLAPPING[1], OVERLAPPING[2]]
    few = CONFIG.model_copy(update={"nms": 1.0, "detections_per_image": 2})
    assert detect(predictions(boxes, rows), NOVEL, few).boxes.tolist() == [boxes[1], boxes[0]]
