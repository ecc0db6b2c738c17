"""The one way to read a picture: RGB of 8 bits a channel, upright, whatever the file holds; and which pictures and
videos a command is to look at: files, folders, patterns, standard input, streams.

- **EXIF orientation**: `detect` turns every file upright. Of a data set, the annotated size decides: what fits it
  turned alone is turned, what fits it as stored alone is not; where both fit (orientations 2 to 4, and squares) the
  setting `exif` does. Its default is to apply: annotation tools, OpenCV and Detectron2 show and read pictures so.
- **See-through** (alpha, a palette with transparency) stands on white; **palettes**, **CMYK** and **grey** are
  converted by Pillow.
- **Grey of 16 bits** gives its upper 8, as Pillow has it for colours; **32 bits and floats**, which have no white of
  their own, are stretched from their lowest to their highest value.
"""

import glob
import io
import math
import os
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hdovd.core import HdovdError, log, shorten
from hdovd.core.picture_header import ENDINGS, open_picture, orientation_of, told
from hdovd.data import Exif, ImageBoxes, Split

if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(4)  # type: ignore[attr-defined]  # memory of a picture that is kept for the next: page faults can cost as much as decoding

KEPT_PIXELS = 25_000_000  # `decode` reduces a larger picture by a whole number: the detector's input is far smaller
KEPT_SIDE = 16_384  # and so it does a longer one
_AVERAGED = (
    "L",
    "LA",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
)  # modes that are reduced before they are converted, which needs less memory
_16_BITS_AT_MOST = ("PNG", "PPM")  # kinds of files that Pillow, some versions of it, opens with mode I, which has 32

AnyPicture = Path | str | bytes | Image.Image | Tensor | np.ndarray


@dataclass(frozen=True, slots=True)
class Decoded:
    """pixels (3, h, w) uint8 RGB; width and height of the whole picture: those of the pixels, or more if it was
    reduced.
    """

    pixels: Tensor
    width: int
    height: int


def read_image(
    path: Path | str, width: int, height: int, data: bytes | None = None, exif: Exif = Exif.APPLY
) -> Image.Image:
    """A picture of a data set, from its file or the file's bytes, as RGB.

    Raises HdovdError, naming `path`, if it cannot be read or is not `width` x `height` pixels.
    """
    return read_annotated(path, width, height, data, exif)[0]


def read_annotated(
    path: Path | str, width: int, height: int, data: bytes | None, exif: Exif
) -> tuple[Image.Image, bool]:
    """`read_image`, and whether its annotated size fits it turned and as stored, so that `exif` decided."""
    with told(str(path)), open_picture(path if data is None else io.BytesIO(data)) as file:
        file.load()  # a PNG may have its EXIF after its pixels
        orientation, kind = orientation_of(file), file.format
        turned = file.size[::-1] if orientation >= 5 else file.size
        if (width, height) not in (file.size, turned):
            by_exif = (
                f" ({turned[0]}x{turned[1]} as its EXIF orientation {orientation} turns it)"
                if turned != file.size
                else ""
            )
            raise HdovdError(f"is {file.width}x{file.height}{by_exif}, the annotation says {width}x{height}")
        either = orientation != 1 and turned == file.size
        if orientation != 1 and (exif is Exif.APPLY if either else (width, height) == turned):
            ImageOps.exif_transpose(file, in_place=True)
        return _rgb(file, kind), either


def read_pixels(split: Split, image: ImageBoxes) -> Tensor:
    """A picture of a split as (3, h, w) uint8 RGB. Raises HdovdError naming the image."""
    try:
        return pixels_of(read_image(split.path(image), image.width, image.height, exif=split.exif))
    except HdovdError as error:
        raise HdovdError(f"image {image.id}: {error}") from error


def read_alike(split: Split, number: int) -> bool:
    """Whether a picture is the same read by any rule, those of before there was a choice included: it is upright, of 8
    bits, and hides nothing. One that cannot be read is not.
    """
    try:
        with told(""), open_picture(split.path(split.images[number])) as file:
            return orientation_of(file) == 1 and not _is_deep(file) and not file.has_transparency_data
    except HdovdError:
        return False


def pixels_of(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8 RGB."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())


def decode(picture: AnyPicture) -> Decoded:
    """A picture in any form, of no data set.

    Args:
        picture: a file, or the bytes of one, turned upright as its EXIF says; or a PIL image, a (3, h, w) uint8 tensor
        or a
            (h, w, 3) uint8 array, taken as it is.

    Raises HdovdError if it cannot be read, or is none of these.
    """
    if isinstance(picture, Tensor | np.ndarray):
        picture = Image.fromarray(_array(picture))
    if not isinstance(picture, Path | str | bytes | Image.Image):
        raise HdovdError(
            f"a picture is a path, a PIL image, a (3, h, w) uint8 tensor or a (h, w, 3) uint8 array, not a "
            f"{type(picture).__name__}"
        )
    with told(str(picture) if isinstance(picture, Path | str) else "the picture"):
        if isinstance(picture, Image.Image):
            return _reduced(picture, *picture.size)
        with open_picture(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as file:
            whole, factor = file.size, _factor(*file.size)
            file.draft(None, (whole[0] // factor, whole[1] // factor))  # a JPEG is decoded at 1/2, 1/4 or 1/8
            file.load()
            lies = orientation_of(file) >= 5
            with suppress(Exception):
                ImageOps.exif_transpose(file, in_place=True)
            return _reduced(file, *(whole[::-1] if lies else whole))


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
    """8 bits a channel, by the rules above. `kind`: of the file, in Pillow's words."""
    if _is_deep(picture):
        of_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and kind in _16_BITS_AT_MOST)
        return Image.fromarray(_grey(np.asarray(picture), of_16_bits=of_16_bits)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _is_deep(picture: Image.Image) -> bool:
    """Grey of more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


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
    array = (
        picture.detach().permute(1, 2, 0).cpu().numpy()
        if isinstance(picture, Tensor) and picture.ndim == 3
        else np.asarray(picture)
    )
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise HdovdError(
            f"a picture as {'a tensor is (3, h, w)' if isinstance(picture, Tensor) else 'an array is (h, w, 3)'} uint8 "
            f"RGB, not {tuple(picture.shape)} {picture.dtype}"
        )
    return np.ascontiguousarray(array)


STANDARD_INPUT = "-"
VIDEO_ENDINGS = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
    ]
)
_MPEG_TS = re.compile(rb"(?s)(?:\x47.{187}){4}\x47|(?:\x47.{191}){4}\x47")  # packets; of camcorders with a time each
_CAMERA = re.compile(r"(?:camera:|/dev/video)(\d+)")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """`name`: what it is called to the user. `data`: the picture itself, where it came by standard input. `url`: of a
    stream, with user, password and query, which the name leaves out; or `camera:0`.
    """

    path: Path
    data: bytes | None = None
    url: str | None = None

    @property
    def is_file(self) -> bool:
        return self.url is None and self.data is None

    @property
    def name(self) -> str:
        if self.url is not None:
            url = urlsplit(self.url)
            return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()
        return "standard input" if self.data is not None else str(self.path)

    @property
    def is_video(self) -> bool:
        """By the ending; a file whose ending TypeScript has too by what is in it."""
        ending = self.path.suffix.lower()
        if self.url is None and ending in (".ts", ".mts") and self.path.is_file():
            with suppress(OSError), self.path.open("rb") as file:  # who reads it says why it cannot be
                return _MPEG_TS.search(file.read(1 << 16)) is not None
        return self.url is not None or ending in VIDEO_ENDINGS


def find_pictures(
    words: Sequence[str], stdin: BinaryIO | None, leave_out: Path, *, videos: bool = False
) -> list[PictureFile]:
    """The pictures that `words` name, in that order, each once. What is in the folder `leave_out` is not among them.

    A word is a file, whatever it is called; a folder, of which all picture files are taken, those of its folders too,
    sorted, but hidden ones; a pattern with `*`, `?`, `[...]` or `**`, of which all files are taken; or `-` for `stdin`:
    paths, one a line or with NUL between them, or the bytes of one picture; or a stream, `rtsp://...`, or a camera,
    `camera:0`. `videos`: those of folders too.

    Raises HdovdError for a word that gives nothing.
    """
    what, inside = "pictures or videos" if videos else "pictures", leave_out.resolve()
    named = [picture for word in words for picture in _named(word, stdin, what, videos)]
    others = [one for one in named if not (one.is_file and one.path.resolve().is_relative_to(inside))]
    found: dict[str, PictureFile] = {}
    for picture in others:
        found.setdefault(os.path.abspath(picture.path) if picture.is_file else picture.url or STANDARD_INPUT, picture)
    if twice := len(others) - len(found):
        log(f"note: {what} that are named more than once, and taken once: {twice}")
    if own := len(named) - len(others):
        log(f"note: {what} left out, since they are in {leave_out}, where the results go: {own}")
    if not found:
        raise HdovdError(f"no {what}: name files, folders, patterns such as 'photos/**/*.jpg', or - for standard input")
    return list(found.values())


def _named(word: str, stdin: BinaryIO | None, what: str, videos: bool) -> list[PictureFile]:
    """Raises HdovdError if there are none."""
    named = list(_of_stdin(stdin) if word == STANDARD_INPUT else _of_word(word, videos))
    if not named:
        raise HdovdError(f"{'standard input' if word == STANDARD_INPUT else printable(word)}: no {what} there")
    return named


def printable(name: str) -> str:
    """A path as it can be printed: names of files need not be text."""
    return os.fsencode(name).decode(errors="replace")


def _of_word(word: str, videos: bool) -> Iterator[PictureFile]:
    path = Path(word)
    if camera := _CAMERA.fullmatch(word):
        yield PictureFile(Path(f"camera{camera[1]}"), url=f"camera:{camera[1]}")
    elif re.match(r"\w+://", word):
        try:
            address = urlsplit(word)
        except ValueError as error:
            raise HdovdError(f"{printable(word)}: no address ({error})") from error
        yield PictureFile(Path(address.path.strip("/") or f"{address.hostname or 'stream'}.live"), url=word)
    elif path.is_dir():
        yield from _of_folder(path, videos)
    elif path.exists():
        yield PictureFile(path)
    elif glob.has_magic(word):
        yield from (
            PictureFile(Path(name)) for name in sorted(glob.iglob(word, recursive=True)) if os.path.isfile(name)
        )
    else:
        raise HdovdError(f"{printable(word)}: no such file or folder")


def _of_folder(folder: Path, videos: bool) -> Iterator[PictureFile]:
    others = Counter[str]()  # videos among them
    for place, folders, files in os.walk(folder, onerror=lambda error: log(f"note: {error}: that folder is left out")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            ending, found = os.path.splitext(name)[1].lower(), PictureFile(Path(place, name))
            if ending in ENDINGS or (videos and found.is_video):
                yield found
            else:
                others[ending or "(none)"] += found.is_video
    if others:
        log(
            f"note: files in {printable(str(folder))} with these endings are no pictures{' or videos' * videos}, and "
            f"left out: {shorten(sorted(others))}"
            + ("; hdovd detect reads videos with pip install 'hdovd[video]'" if others.total() else "")
        )


def _of_stdin(stdin: BinaryIO | None) -> list[PictureFile]:
    data = b"" if stdin is None else stdin.read()
    if _is_picture(data):
        return [PictureFile(Path("stdin"), data)]
    data = data.removeprefix(BOM_UTF8)
    names = (line.strip(b"\r\n") for line in data.split(b"\0" if b"\0" in data else b"\n"))
    return [PictureFile(Path(os.fsdecode(name))) for name in names if name]


def _is_picture(data: bytes) -> bool:
    try:
        with open_picture(io.BytesIO(data)):
            return True
    except HdovdError:  # of too many pixels
        return True
    except Exception:  # a list of paths, or nothing
        return False
