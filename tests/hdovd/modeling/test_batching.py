"""From pictures of any size to one padded batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.config.recipe import InputConfig
from hdovd.modeling.batching import batch_images, draw_short_sides

CONFIG = InputConfig(short_side=64, long_side=96, flip=0.0, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.5])


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(image: Tensor) -> Tensor:
    return torch.stack([(image[c].float() / 255 - CONFIG.mean[c]) / CONFIG.std[c] for c in range(3)])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 96), (64, 96)),
        ((32, 48), (64, 96)),  # short side
        ((128, 128), (64, 64)),
        ((100, 300), (32, 96)),  # long side caps it
        ((300, 100), (96, 32)),
        ((50, 70), (64, 90)),  # 70 * 64 / 50 = 89.6
    ],
)
def test_size_and_factors(size: tuple[int, int], expected: tuple[int, int]) -> None:
    batch, factors = batch_images([picture(*size)], CONFIG)
    assert batch.image_sizes == [expected]
    assert factors == [(pytest.approx(expected[1] / size[1]), pytest.approx(expected[0] / size[0]))]


def test_padding_is_zero_and_to_a_multiple_of_32() -> None:
    batch, _ = batch_images([picture(64, 70), picture(66, 64), picture(300, 100)], CONFIG)
    assert batch.tensors.shape == (3, 3, 96, 96)
    assert batch.image_sizes == [(64, 70), (66, 64), (96, 32)]
    for image, (height, width) in zip(batch.tensors, batch.image_sizes, strict=True):
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
        assert image[:, :height, :width].any()
    exact, _ = batch_images([picture(64, 96)], CONFIG)
    assert exact.tensors.shape[-2:] == (64, 96)


def test_a_picture_at_scale_is_only_normalised() -> None:
    image = picture(64, 90)
    batch, factors = batch_images([image], CONFIG)
    assert factors == [(1.0, 1.0)]
    torch.testing.assert_close(batch.tensors[0, :, :64, :90], normalised(image), atol=1e-6, rtol=0)


def test_a_resized_picture_is_bilinear() -> None:
    image = picture(32, 48)
    batch, _ = batch_images([image], CONFIG)
    expected = F.interpolate(normalised(image)[None], (64, 96), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(batch.tensors[0], expected, atol=1e-5, rtol=0)


def test_pictures_of_a_batch_do_not_mix() -> None:
    images = [picture(64, 70, 1), picture(66, 64, 2)]
    together, _ = batch_images(images, CONFIG)
    for image, row, (height, width) in zip(images, together.tensors, together.image_sizes, strict=True):
        alone, _ = batch_images([image], CONFIG)
        torch.testing.assert_close(row[:, :height, :width], alone.tensors[0, :, :height, :width])


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1)])
def test_a_sliver_keeps_at_least_a_pixel(size: tuple[int, int]) -> None:
    batch, factors = batch_images([picture(*size)], CONFIG)
    assert min(batch.image_sizes[0]) >= 1
    assert min(factors[0]) > 0
    assert batch.tensors.isfinite().all()


def test_every_picture_has_the_short_side_asked_for() -> None:
    batch, factors = batch_images([picture(50, 70), picture(50, 70), picture(100, 300)], CONFIG, [64, 40, 48])
    assert batch.image_sizes == [(64, 90), (40, 56), (32, 96)]  # the last is capped by the long side
    assert factors[1] == (pytest.approx(0.8), pytest.approx(0.8))


SCALES = CONFIG.model_copy(update={"train_short_sides": [40, 48, 64]})


def test_scales_are_drawn_by_key_and_evenly() -> None:
    drawn = draw_short_sides(range(3000), SCALES)
    assert all(abs(drawn.count(side) - 1000) < 6 * 1000**0.5 for side in (40, 48, 64))
    torch.manual_seed(7)
    assert draw_short_sides([5, 900, 5], SCALES) == [drawn[5], drawn[900], drawn[5]]


def test_without_keys_the_global_generator_draws_scales() -> None:
    torch.manual_seed(7)
    first = draw_short_sides([None] * 40, SCALES)
    torch.manual_seed(7)
    assert draw_short_sides([None] * 40, SCALES) == first
    assert set(first) == {40, 48, 64}


def test_without_training_scales_nothing_is_drawn() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert draw_short_sides([1, None], CONFIG) == [64, 64]
    assert torch.equal(torch.get_rng_state(), before)
