"""Boxes with labels on a picture: all that hdovd draws of detections, truth or cached rows.

Pillow, and not torchvision's `draw_bounding_boxes`: that one puts no ground behind
its labels at the oldest torchvision that hdovd supports, and has no font of its own that can be set larger. Pillow's
own font has the letters of English and its neighbours; for others common fonts are tried.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_COMMON = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "NotoSans-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
)


def label_font(text: str, size: int) -> Font:
    """Pillow's own font, or where it lacks a character of `text` the first common one of the system's that has them
    all; its own again if none has.
    """
    fonts = (_font(name, size) for name in ("", *_COMMON))
    able = (font for font in fonts if all(_has(font, character) for character in text if not character.isspace()))
    return next(able, _font("", size))


def cut_label(text: str, width: float, size: int) -> str:
    """The text, with dots at its end if it is wider than `width` pixels."""
    font = label_font(text, size)
    if font.getlength(text) <= width:
        return text
    fitting = (text[:length] + "..." for length in range(len(text), -1, -1))
    return next((cut for cut in fitting if font.getlength(cut) <= width), "...")


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> Font:
    """Pillow's own without a name, and for one that is not here."""
    with suppress(OSError):
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _has(font: Font, character: str) -> bool:
    if ord(character) < 128 or not isinstance(font, ImageFont.FreeTypeFont):  # without FreeType there is one font
        return True
    # no font has U+10FFFF: it is drawn as what stands for a missing one
    mask, missing = font.getmask(character), font.getmask("\U0010ffff")
    return mask.size != missing.size or bytes(mask) != bytes(missing)


Colour = tuple[int, int, int]
BASE_COLOUR, NOVEL_COLOUR, TRUTH_COLOUR = (60, 140, 255), (255, 130, 0), (255, 255, 255)
SMALLEST_WIDTH_PX = 480
LARGEST_SIDE_PX = 4_000  # of a picture that was enlarged: a narrow one can be long


@dataclass(frozen=True, slots=True)
class Labelled:
    """A box, xyxy pixels of the picture, what is written on it, and the colour of both."""

    box: tuple[float, float, float, float]
    text: str
    colour: Colour


def draw_boxes(picture: Image.Image, boxes: Sequence[Labelled], title: str = "") -> Image.Image:
    """An RGB copy with boxes, the first on top; a picture narrower than `SMALLEST_WIDTH_PX` is enlarged so that its
    labels can be read.

    `title` is written into the lower left corner. Labels in other scripts than Latin take a font of the system's, if it
    has one.
    """
    scale = max(1, min(-(-SMALLEST_WIDTH_PX // picture.width), LARGEST_SIDE_PX // max(picture.size)))
    canvas = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen, unit = ImageDraw.Draw(canvas), max(1.0, max(canvas.size) / 1000)
    size, line = round(14 * unit), round(17 * unit)
    for labelled in reversed(boxes):
        box = [v * scale for v in labelled.box]
        pen.rectangle(box, outline=labelled.colour, width=round(3 * unit))
        if labelled.text:
            font = label_font(labelled.text, size)
            left, top = min(max(box[0], 0), canvas.width - 1), max(box[1] - line, 0)
            pen.rectangle((left, top, left + pen.textlength(labelled.text, font) + 6, top + line), fill=labelled.colour)
            pen.text((left + 3, top), labelled.text, fill="black", font=font)
    if title:
        font = label_font(title, size)
        pen.rectangle((0, canvas.height - line - 3, pen.textlength(title, font) + 10, canvas.height), fill="black")
        pen.text((5, canvas.height - line - 2), title, fill=TRUTH_COLOUR, font=font)
    return canvas
