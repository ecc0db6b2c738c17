"""A picture file opened, and what its header says; nothing is decoded that need not be."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from hdovd.core import HdovdError, system_line

MOST_PIXELS = 500_000_000  # refused beyond: 2 GB decoded, and a small file that claims more can be an attack
ENDINGS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".gif",
        ".avif",
        ".jp2",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".mpo",
        ".heic",
        ".heif",
    )
)  # of picture files; Pillow may not read the last two
_bomb_limit = threading.Lock()


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as its EXIF orientation turns it. Raises HdovdError, naming it, if it is none."""
    with told(str(path)), open_picture(path) as file:
        return file.size[::-1] if orientation_of(file) >= 5 else file.size


@contextmanager
def told(name: str) -> Iterator[None]:
    """Raises HdovdError, naming the picture, for whatever is wrong with it."""
    try:
        yield
    except FileNotFoundError:
        raise HdovdError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise HdovdError(f"{name} is a folder, expected a picture") from None
    except UnidentifiedImageError:
        raise HdovdError(f"{name}: no picture of a kind that Pillow reads") from None
    except HdovdError as error:
        raise HdovdError(f"{name} {error}") from None
    except PermissionError as error:
        raise HdovdError(system_line(error)) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise HdovdError(f"{name}: {error}" if str(error) else f"{name}: {error!r}") from error


def open_picture(source: Any) -> Image.Image:
    """Pillow's own limit, a setting of the whole process, is lifted for as long as a file is opened: `MOST_PIXELS` is
    the one here.
    """
    with _bomb_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            file = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if file.width * file.height > MOST_PIXELS:
        file.close()
        raise HdovdError(
            f"has {file.width}x{file.height} pixels, more than the {MOST_PIXELS:,d} that are read: make it smaller"
        )
    return file


def orientation_of(file: Image.Image) -> int:
    """EXIF's, 1 for upright to 8; from 5 on the picture lies on its side. Pictures without it, and with what is no
    orientation, are taken as they are.
    """
    with suppress(Exception):  # a picture with damaged EXIF is a picture
        found = file.getexif().get(ExifTags.Base.Orientation, 1)
        return found if isinstance(found, int) and 1 <= found <= 8 else 1
    return 1
