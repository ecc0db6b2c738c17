"""From pictures of any size to one padded batch at the detector's input scale."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from hdovd.config.recipe import InputConfig
from hdovd.modeling.sampling import Use, image_generator

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
