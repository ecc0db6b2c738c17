"""Reading pictures, checked against their annotation."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hdovd.coco import ImageBoxes, Split
from hdovd.errors import HdovdError

if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]  # memory of a picture that is kept for the next: page faults can cost as much as decoding


def read_image(path: Path | str, width: int, height: int, data: bytes | None = None) -> Image.Image:
    """Decode a picture, from its file or the file's bytes, as RGB.

    Raises HdovdError, naming `path`, if it cannot be read or is not `width` x `height` pixels.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as file:
            file.load()
            image = file if file.mode == "RGB" else file.convert("RGB")
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
    return pixels_of(picture)


def pixels_of(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8 RGB."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())
