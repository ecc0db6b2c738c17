"""Any picture as the detector takes it: RGB of 8 bits, upright, of a size that fits into memory.

Called by `detector` and `detect`. `images.read_image` is the one for data sets, whose annotations say what a picture is.
"""

from __future__ import annotations

import io
import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hdovd.errors import HdovdError
from hdovd.pipelines.images import pixels_of

MOST_PIXELS = 500_000_000  # refused beyond: 2 GB decoded, and a small file that claims more can be an attack
KEPT_PIXELS = 25_000_000  # a larger picture is reduced by a whole number: the detector's input is far smaller
KEPT_SIDE = 16_384  # and so is a longer one
_ORIENTATION = 0x0112  # of EXIF; from 5 on the picture lies on its side
_AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes that are reduced before they are converted, which needs less memory
_16_BITS_AT_MOST = ("PNG", "PPM")  # kinds of files that Pillow, some versions of it, opens with mode I, which has 32
_bomb_limit = threading.Lock()

AnyPicture = Path | str | bytes | Image.Image | Tensor | np.ndarray


@dataclass(frozen=True, slots=True)
class Decoded:
    """pixels (3, h, w) uint8 RGB; width and height of the whole picture: those of the pixels, or more if it was reduced."""

    pixels: Tensor
    width: int
    height: int


def decode(picture: AnyPicture) -> Decoded:
    """A picture in any form.

    Args:
        picture: a file, or the bytes of one, turned upright as its EXIF says; or a PIL image, a (3, h, w) uint8 tensor or a
            (h, w, 3) uint8 array, taken as it is.

    Raises HdovdError if it cannot be read, or is none of these.
    """
    if isinstance(picture, Tensor | np.ndarray):
        image = Image.fromarray(_array(picture))
        return _reduced(image, *image.size)
    if not isinstance(picture, Path | str | bytes | Image.Image):
        raise HdovdError(f"a picture is a path, a PIL image, a (3, h, w) uint8 tensor or a (h, w, 3) uint8 array, not a "
                         f"{type(picture).__name__}")
    name = str(picture) if isinstance(picture, Path | str) else "the picture"
    try:
        if isinstance(picture, Image.Image):
            return _reduced(picture, *picture.size)
        return _read(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
    except FileNotFoundError:
        raise HdovdError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise HdovdError(f"{name} is a folder, expected a picture") from None
    except UnidentifiedImageError:
        raise HdovdError(f"{name}: no picture of a kind that Pillow reads") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise HdovdError(f"{name}: {error}" if str(error) else f"{name}: {error!r}") from error


def _read(source: Any) -> Decoded:
    with _open(source) as file:
        whole = file.size
        if whole[0] * whole[1] > MOST_PIXELS:
            raise HdovdError(f"{whole[0]}x{whole[1]} pixels are more than the {MOST_PIXELS:,d} that are read: make it smaller")
        if (factor := _factor(*whole)) > 1:
            file.draft(None, (whole[0] // factor, whole[1] // factor))  # a JPEG is decoded at 1/2, 1/4 or 1/8; others ignore it
        drafted, orientation = file.size != whole, 1
        with suppress(Exception):  # a picture with damaged EXIF is a picture
            orientation = file.getexif().get(_ORIENTATION, 1)
        file.load()
        with suppress(Exception):
            ImageOps.exif_transpose(file, in_place=True)
        if not drafted:
            return _reduced(file, *file.size)
        return _reduced(file, *(reversed(whole) if orientation in (5, 6, 7, 8) else whole))


def _open(source: Any) -> Image.Image:
    """Pillow's own limit, a setting of the whole process, is lifted for as long as a file is opened: `MOST_PIXELS` is the one here."""
    with _bomb_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _factor(width: int, height: int) -> int:
    return max(1, math.ceil(max(width, height) / KEPT_SIDE), math.ceil(math.sqrt(width * height / KEPT_PIXELS)))


def _reduced(picture: Image.Image, width: int, height: int) -> Decoded:
    """As RGB. width, height: of the whole picture, upright."""
    factor, kind = _factor(*picture.size), picture.format  # which what is made of a picture no longer has
    if factor > 1 and picture.mode in _AVERAGED:
        picture = picture.reduce(factor)
    picture = _rgb(picture, kind)
    return Decoded(pixels_of(picture if _factor(*picture.size) == 1 else picture.reduce(factor)), width, height)


def _rgb(picture: Image.Image, kind: str | None) -> Image.Image:
    """8 bits a channel. What can be seen through stands on white. Grey of 16 bits gives its upper 8, as Pillow has it for colours;
    32 bits and floats, which have no white of their own, are stretched from their lowest to their highest value. `kind`: of the file,
    in Pillow's words."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        of_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and kind in _16_BITS_AT_MOST)
        return Image.fromarray(_grey(np.asarray(picture), of_16_bits=of_16_bits)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _grey(values: np.ndarray, *, of_16_bits: bool) -> np.ndarray:
    """(h, w) integers or floats -> uint8."""
    if of_16_bits:
        return (values >> 8).astype(np.uint8)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    unit = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    return (255 * unit + 0.5).astype(np.uint8)


def _array(picture: Tensor | np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8. Raises HdovdError for any other picture."""
    tensor = isinstance(picture, Tensor)
    array = picture.detach().permute(1, 2, 0).cpu().numpy() if isinstance(picture, Tensor) and picture.ndim == 3 else np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise HdovdError(f"a picture as {'a tensor is (3, h, w)' if tensor else 'an array is (h, w, 3)'} uint8 RGB, not "
                         f"{tuple(picture.shape)} {picture.dtype}")
    return np.ascontiguousarray(array)
