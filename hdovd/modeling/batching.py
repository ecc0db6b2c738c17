"""From pictures of any size to one padded batch at the detector's input scale, and the random choices about each image.

Which anchors and RoIs are trained on, and at which scale, is drawn from a generator of the image's own, seeded by its
key: it depends neither on the other images of the batch, nor on their order, nor on the number of processes.
n candidates of an image.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from hdovd.config.recipe import InputConfig
from hdovd.core import HdovdError

_MASK = 2**64 - 1


class Use(IntEnum):
    """What a random choice is about; choices of one image do not share random numbers."""

    ANCHORS = 1
    ROIS = 2
    SCALE = 3
    NOISE = 4


def keys_of(keys: Sequence[int] | None, images: int) -> Sequence[int | None]:
    """One key or None an image. Raises HdovdError if there are not as many keys as images, or one is out of range."""
    if keys is None:
        return [None] * images
    if len(keys) != images or not all(0 <= key < 2**63 for key in keys):
        raise HdovdError(f"keys {list(keys)}: expected one an image, {images}, whole numbers from 0 to 2**63 - 1")
    return keys


def image_generator(key: int | None, use: Use, device: torch.device | str = "cpu") -> torch.Generator | None:
    """The generator of one choice about one image; None, which stands for torch's global one, without a key."""
    return None if key is None else torch.Generator(device).manual_seed(_mixed(key, use))


def sample_balanced(
    positive: Tensor, negative: Tensor, samples: int, positive_share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw at most `samples * positive_share` positives, and negatives for the rest of `samples`.

    Args:
        positive, negative: (n,) bool, never both.
        generator: on the device of the masks; None draws from torch's global one.

    Returns:
        (n,) bool positives drawn, (n,) bool negatives drawn. Nothing waits for the device.
    """
    lot = torch.rand(len(positive), device=positive.device, generator=generator)
    drawn = _lowest(lot, positive, int(samples * positive_share), None)
    return drawn, _lowest(lot, negative, samples, samples - drawn.sum())


def _lowest(lot: Tensor, allowed: Tensor, most: int, wanted: Tensor | None) -> Tensor:
    """(n,) bool: the `most` allowed ones with the lowest lots, or the first `wanted` () of those."""
    places = lot.masked_fill(~allowed, 2.0).topk(min(most, len(lot)), largest=False).indices
    keep = torch.ones_like(places, dtype=torch.bool)
    if wanted is not None:
        keep = torch.arange(len(places), device=lot.device) < wanted
    return torch.zeros_like(allowed).scatter(0, places, keep) & allowed


def _mixed(key: int, use: Use) -> int:
    """All bits of key and use in every bit of the seed: torch's CPU generator looks at the lower 32 alone.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    z = (key + use * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


SIZE_DIVISOR = 32  # the coarsest stride of the pyramid


def draw_short_sides(keys: Sequence[int | None], config: InputConfig) -> list[int]:
    """The short side of each image of a training step: one of `train_short_sides`, drawn by its key, if there are
    any."""
    choices = config.train_short_sides
    if not choices:
        return [config.short_side] * len(keys)
    return [choices[int(torch.randint(len(choices), (), generator=image_generator(key, Use.SCALE)))] for key in keys]


def input_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(h, w) of a picture at the detector's input scale, before padding."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(int(height * scale + 0.5), 1), max(
        int(width * scale + 0.5), 1
    )  # halves up, as mmcv does; round() would go to even ones


def padded(side: int) -> int:
    """The side of the batch that a side of so many pixels takes alone."""
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR


def batch_images(
    images: list[Tensor], config: InputConfig, short_sides: Sequence[int] | None = None
) -> tuple[ImageList, list[tuple[float, float]]]:
    """Normalise, resize (short side, capped by the long side, bilinear) and pad a batch.

    Args:
        images: (3, h, w) uint8 RGB each. short_sides: pixels, one an image; None: that of the config.

    Returns:
        The padded batch with the size of each picture in it, and the (x, y) resize factors of each.
    """
    mean, std = torch.tensor([config.mean, config.std]).view(2, 3, 1, 1).to(images[0].device, non_blocking=True)
    resized, factors = [], []
    for image, short_side in zip(
        images, [config.short_side] * len(images) if short_sides is None else short_sides, strict=True
    ):
        height, width = image.shape[-2:]
        size = input_size(height, width, short_side, config.long_side)
        pixels = (image.float() / 255 - mean) / std
        if size != (height, width):
            pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        resized.append(pixels)
        factors.append((size[1] / width, size[0] / height))
    sizes = [(int(p.shape[1]), int(p.shape[2])) for p in resized]
    height, width = (padded(max(s)) for s in zip(*sizes, strict=True))
    batch = resized[0].new_zeros(len(images), 3, height, width)
    for i, pixels in enumerate(resized):
        batch[i, :, : pixels.shape[1], : pixels.shape[2]] = pixels
    return ImageList(batch.contiguous(memory_format=torch.channels_last), sizes), factors
