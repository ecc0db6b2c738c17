"""Reading pictures, checked against their annotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdovd.coco import ImageBoxes, Split
from hdovd.errors import HdovdError


def read_image(path: Path, width: int, height: int) -> Image.Image:
    """Decode a picture as RGB. Raises HdovdError if it cannot be read or is not `width` x `height` pixels."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError:
        raise HdovdError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise on damaged files
        raise HdovdError(f"{path}: {error}") from error
    if image.size != (width, height):
        raise HdovdError(f"{path} is {image.width}x{image.height}, the annotation says {width}x{height}")
    return image


def read_pixels(split: Split, image: ImageBoxes) -> Tensor:
    """A picture of a split as (3, h, w) uint8 RGB. Raises HdovdError naming the image."""
    try:
        picture = read_image(split.path(image), image.width, image.height)
    except HdovdError as error:
        raise HdovdError(f"image {image.id}: {error}") from error
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
