"""Matching, sampling and pooling of RoIs."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from hdovd.modeling.rois import PyramidRoIAlign, RoIAlignOnCpu, sample_rois_of_images


def sample_rois(proposals: Tensor, boxes: Tensor, samples: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """`sample_rois_of_images` of one image."""
    (rois,), (matches,), _ = sample_rois_of_images([proposals], [boxes], samples, positive_share, [None])
    return rois, matches


def naive_iou(a: Tensor, b: Tensor) -> float:
    wide = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
    tall = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
    area = lambda r: float((r[2] - r[0]) * (r[3] - r[1]))  # noqa: E731
    return wide * tall / (area(a) + area(b) - wide * tall)


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(count, 2, generator=generator) * 60, 5 + torch.rand(count, 2, generator=generator) * 40
    return torch.cat([corner, corner + side], dim=1)


def test_without_boxes_all_is_background() -> None:
    proposals = random_boxes(10, 0)
    rois, matches = sample_rois(proposals, torch.zeros(0, 4), 4, 0.25)
    assert rois.shape == (4, 4)
    assert matches.tolist() == [-1] * 4
    assert matches.dtype == torch.int64
    assert all(any(torch.equal(roi, p) for p in proposals) for roi in rois)
    rois, matches = sample_rois(proposals, torch.zeros(0, 4), 64, 0.25)
    assert len(rois) == len(matches) == 10


def test_without_boxes_and_proposals() -> None:
    rois, matches = sample_rois(torch.zeros(0, 4), torch.zeros(0, 4), 4, 0.25)
    assert rois.shape == (0, 4)
    assert matches.shape == (0,)


def test_boxes_take_part_themselves() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 80.0, 90.0]])
    rois, matches = sample_rois(torch.zeros(0, 4), boxes, 16, 0.5)
    assert matches.sort().values.tolist() == [0, 1]
    assert torch.equal(rois, boxes[matches])


def test_half_overlap_is_positive_and_less_is_not() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    proposals = torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 4.9], [40.0, 40.0, 50.0, 50.0]])
    rois, matches = sample_rois(proposals, boxes, 16, 1.0)
    found = {tuple(round(v, 1) for v in roi.tolist()): int(m) for roi, m in zip(rois, matches, strict=True)}
    assert found[0.0, 0.0, 10.0, 10.0] == 0
    assert found[0.0, 0.0, 10.0, 5.0] == 0
    assert found.get((0.0, 0.0, 10.0, 4.9), -1) == -1
    assert found.get((40.0, 40.0, 50.0, 50.0), -1) == -1


def test_a_box_that_nothing_covers_takes_no_weak_match() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 110.0, 110.0]])
    proposals = torch.tensor([[104.0, 104.0, 114.0, 114.0]])  # IoU 0.22 with the second box, its best proposal
    rois, matches = sample_rois(proposals, boxes, 16, 0.5)
    weak = [int(m) for roi, m in zip(rois, matches, strict=True) if torch.equal(roi, proposals[0])]
    assert weak == [-1]


def test_every_roi_belongs_to_the_box_it_overlaps_most() -> None:
    boxes, proposals = random_boxes(6, 1), random_boxes(200, 2)
    rois, matches = sample_rois(proposals, boxes, 512, 1.0)
    assert (matches >= 0).sum() > 6
    for roi, match in zip(rois, matches.tolist(), strict=True):
        overlaps = [naive_iou(roi, box) for box in boxes]
        best = max(overlaps)
        assert (match >= 0) == (best >= 0.5)
        if match >= 0:
            assert overlaps[match] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("samples", "share"), [(8, 0.25), (16, 0.5), (40, 0.25)])
def test_sample_cap_and_share_of_positives(samples: int, share: float) -> None:
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    near = boxes + torch.linspace(0, 2, 30)[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    far = random_boxes(60, 3) + 100
    rois, matches = sample_rois(torch.cat([near, far]), boxes, samples, share)
    assert len(rois) == len(matches) == samples
    assert (matches >= 0).sum() == int(samples * share)


def test_missing_positives_are_made_up_by_background() -> None:
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    _, matches = sample_rois(random_boxes(60, 3) + 100, boxes, 12, 0.5)
    assert sorted(matches.tolist()) == [-1] * 11 + [0]


def features(levels: list[int], images: int, side: int = 256) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {str(level): torch.randn(images, 2, side >> level, side >> level, generator=generator) for level in levels}


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        (2.0, 2.0, 2),
        (8.0, 8.0, 2),
        (15.9, 15.9, 2),
        (16.0, 16.0, 3),
        (8.0, 32.0, 3),
        (31.9, 31.9, 3),
        (32.0, 32.0, 4),
        (63.9, 63.9, 4),
        (64.0, 64.0, 5),
        (128.0, 32.0, 5),
        (200.0, 200.0, 5),
    ],
)
def test_a_roi_is_pooled_from_the_level_of_its_size(width: float, height: float, level: int) -> None:
    maps = features([2, 3, 4, 5], 1)
    roi = torch.tensor([[7.3, 9.1, 7.3 + width, 9.1 + height]])
    expected = roi_align(maps[str(level)], [roi], 7, spatial_scale=1 / 2**level, sampling_ratio=-1, aligned=True)
    torch.testing.assert_close(PyramidRoIAlign([5, 3, 4, 2], 32)(maps, [roi]), expected, atol=1e-6, rtol=0)


def test_canonical_size_goes_to_level_4() -> None:
    maps, roi = features([2, 3, 4, 5], 1), torch.tensor([[0.0, 0.0, 224.0, 224.0]])
    expected = roi_align(maps["4"], [roi], 7, spatial_scale=1 / 16, aligned=True)
    torch.testing.assert_close(PyramidRoIAlign([2, 3, 4, 5], 224)(maps, [roi]), expected, atol=1e-6, rtol=0)


def test_rois_of_a_batch_keep_their_order_and_image() -> None:
    maps = features([3, 4, 5], 3)
    rois = [random_boxes(5, 5) * 2, torch.zeros(0, 4), random_boxes(4, 6) * 2]
    pooled = PyramidRoIAlign([3, 4, 5], 48)(maps, rois)
    assert pooled.shape == (9, 2, 7, 7)
    row = 0
    for image, boxes in enumerate(rois):
        for box in boxes:
            side = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
            level = min(max(math.floor(4 + math.log2(side / 48)), 3), 5)
            expected = roi_align(
                maps[str(level)][image : image + 1], [box[None]], 7, spatial_scale=2.0**-level, aligned=True
            )
            torch.testing.assert_close(pooled[row], expected[0], atol=1e-5, rtol=0)
            row += 1


def test_gradient_reaches_only_the_levels_used() -> None:
    maps = {name: f.requires_grad_() for name, f in features([3, 4, 5], 1).items()}
    PyramidRoIAlign([3, 4, 5], 32)(maps, [torch.tensor([[0.0, 0.0, 40.0, 40.0]])]).sum().backward()
    touched = {name for name, f in maps.items() if f.grad is not None and bool(f.grad.any())}
    assert touched == {"4"}


def test_no_rois() -> None:
    maps = {name: f.requires_grad_() for name, f in features([3, 4], 2).items()}
    pooled = PyramidRoIAlign([3, 4], 32)(maps, [torch.zeros(0, 4), torch.zeros(0, 4)])
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()


def test_half_precision_maps_are_pooled_in_float32() -> None:
    maps = {name: f.to(torch.bfloat16) for name, f in features([3, 4], 1).items()}
    roi = torch.tensor([[3.0, 3.0, 60.0, 70.0]])
    pooled = PyramidRoIAlign([3, 4], 32)(maps, [roi])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, roi_align(maps["4"].float(), [roi], 7, spatial_scale=1 / 16, aligned=True))


@pytest.mark.parametrize("count", [48, 50])  # the last two are long
@pytest.mark.parametrize("samples", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(12, 9), (1, 5), (2, 1), (90, 80)])
def test_the_gradient_on_a_cpu_is_torchvisions(size: tuple[int, int], samples: int, count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    maps = torch.randn(3, 4, *size, generator=generator, requires_grad=True)
    boxes = random_boxes(40, 8)
    odd = torch.tensor(
        [
            [0.0, 0, 0, 0],
            [10, 10, 10, 30],
            [5, 5, 5.001, 5.001],
            [-60, -60, 160, 160],
            [-90, -90, -70, -70],
            [95, 70, 130, 90],
            [30, 30, 20, 20],
            [0, 0, 72, 96],
            [0, 90, 610, 110],
            [60, 3, 75, 700],
        ]
    )
    rois = torch.cat([torch.randint(0, 3, (50, 1), generator=generator).float(), torch.cat([boxes, odd])], dim=1)[
        :count
    ]
    expected = roi_align(maps, rois, 7, 1 / 8, samples, aligned=True)
    pooled = RoIAlignOnCpu.apply(maps, rois, 7, 1 / 8, samples)
    assert torch.equal(pooled, expected)
    weight = torch.randn(pooled.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(pooled, maps, weight), torch.autograd.grad(expected, maps, weight), atol=1e-5, rtol=1e-5
    )


def test_no_rois_have_no_gradient() -> None:
    maps = torch.randn(1, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(RoIAlignOnCpu.apply(maps, torch.zeros(0, 5), 7, 0.25, 2).sum(), maps)
    assert torch.equal(gradient, torch.zeros_like(maps))
