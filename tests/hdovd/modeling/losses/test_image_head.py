"""Level 3's embedding (METHOD section 6) against one image at a time, sampled with loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from hdovd.modeling.losses.imagewise import ImageHead

CHANNELS, DIM = 3, 5


def head() -> ImageHead:
    torch.manual_seed(0)
    built = ImageHead(CHANNELS, DIM)
    torch.nn.init.normal_(built.norm.weight)
    torch.nn.init.normal_(built.norm.bias)
    return built


def pyramid(images: int, height: int, width: int, seed: int = 1) -> list[Tensor]:
    """P3, P4, P5 of padded pictures of height x width."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, CHANNELS, height // s, width // s, generator=generator) for s in (8, 16, 32)]


def bilinear(grid: Tensor, y: float, x: float) -> Tensor:
    """Value (C,) of (C, h, w) at a point in cell units, cell centres at whole numbers, edges held."""
    height, width = grid.shape[-2:]
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(math.floor(y), height - 1), min(math.floor(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    return (1 - dy) * ((1 - dx) * grid[:, top, left] + dx * grid[:, top, right]) + dy * (
        (1 - dx) * grid[:, bottom, left] + dx * grid[:, bottom, right]
    )


def naive_embedding(model: ImageHead, levels: list[Tensor], image: int, size: tuple[int, int]) -> Tensor:
    coarse = levels[-1][image]
    fused = coarse.clone()
    for level in levels[:-1]:
        fine, (height, width) = level[image], coarse.shape[-2:]
        ratio_y, ratio_x = fine.shape[1] / height, fine.shape[2] / width
        for y in range(height):
            for x in range(width):
                fused[:, y, x] += bilinear(fine, (y + 0.5) * ratio_y - 0.5, (x + 0.5) * ratio_x - 0.5)
    # 7 x 7 bins of 2 x 2 samples over the valid area: 14 x 14 points, and the mean over bins is the mean over points
    points = [
        bilinear(fused, (r + 0.5) * size[0] / 32 / 14 - 0.5, (c + 0.5) * size[1] / 32 / 14 - 0.5)
        for r in range(14)
        for c in range(14)
    ]
    pooled = torch.stack(points).mean(dim=0)
    centred = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + model.norm.eps).sqrt()
    row = model.project.weight @ (centred * model.norm.weight + model.norm.bias) + model.project.bias
    return row / row.norm()


def test_equals_one_image_at_a_time() -> None:
    model, levels, sizes = head(), pyramid(3, 96, 160), [(96, 160), (70, 130), (33, 64)]
    g = model(levels, sizes, 32)
    assert g.shape == (3, DIM)
    for image, size in enumerate(sizes):
        torch.testing.assert_close(g[image], naive_embedding(model, levels, image, size), atol=1e-5, rtol=1e-4)


def test_padding_away_from_the_valid_area_has_no_say() -> None:
    model, levels, size = head(), pyramid(1, 256, 256), (96, 128)
    before = model(levels, [size], 32)
    for level, stride in zip(levels, (8, 16, 32), strict=True):
        level[:, :, (size[0] + 64) // stride :] += 100.0
        level[:, :, :, (size[1] + 64) // stride :] -= 100.0
    torch.testing.assert_close(model(levels, [size], 32), before, atol=0, rtol=0)


def test_the_valid_area_has_a_say() -> None:
    model, levels = head(), pyramid(1, 128, 128)
    before = model(levels, [(64, 64)], 32)
    assert (model(levels, [(128, 128)], 32) - before).abs().max() > 1e-3
    for level in range(3):
        changed = [f.clone() for f in levels]
        changed[level][:, 0, : 64 // (8, 16, 32)[level], : 64 // (8, 16, 32)[level]] += 1.0
        assert (model(changed, [(64, 64)], 32) - before).abs().max() > 1e-3


def test_rows_are_normalised_and_gradient_reaches_every_level() -> None:
    model, levels = head(), [f.requires_grad_() for f in pyramid(2, 64, 64)]
    g = model(levels, [(64, 64), (64, 40)], 32)
    torch.testing.assert_close(g.norm(dim=1), torch.ones(2))
    (g * torch.arange(DIM)).sum().backward()
    for level in levels:
        assert level.grad is not None
        assert level.grad.abs().sum() > 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_single_level_is_enough(count: int) -> None:
    level = torch.randn(count, CHANNELS, 4, 4)
    model = head()
    expected = F.normalize(
        model.project(
            model.norm(
                torch.stack(
                    [
                        torch.stack(
                            [
                                bilinear(level[i], (r + 0.5) * 4 / 14 - 0.5, (c + 0.5) * 4 / 14 - 0.5)
                                for r in range(14)
                                for c in range(14)
                            ]
                        ).mean(0)
                        for i in range(count)
                    ]
                )
            )
        ),
        dim=1,
    )
    torch.testing.assert_close(model([level], [(128, 128)] * count, 32), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_equal_resize_and_roi_align(layout: torch.memory_format) -> None:
    """torchvision's and torch's own operations, one after the other; maps of odd sizes too, as padding to 32 never
    makes them.
    """
    model, sizes = head(), [(96, 160), (70, 130), (33, 64)]
    fine, _, coarse = pyramid(3, 96, 160)
    levels = [f.to(memory_format=layout).requires_grad_() for f in (fine, torch.randn(3, CHANNELS, 7, 9), coarse)]
    fused = levels[-1]
    for level in levels[:-1]:
        fused = fused + F.interpolate(level, fused.shape[-2:], mode="bilinear", align_corners=False)
    areas = [torch.tensor([[0.0, 0.0, width, height]]) for height, width in sizes]
    pooled = roi_align(fused, areas, 7, spatial_scale=1 / 32, sampling_ratio=2, aligned=True).mean(dim=(2, 3))
    expected = F.normalize(model.project(model.norm(pooled)), dim=1)
    found = model(levels, sizes, 32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(3, DIM)
    for one, two in zip(
        torch.autograd.grad((found * weight).sum(), levels),
        torch.autograd.grad((expected * weight).sum(), levels),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
