"""Boxes with labels on a picture: what every picture that hdovd makes of detections, truth or cached rows is drawn
with.

Pillow, and not torchvision's `draw_bounding_boxes`: that one puts no ground behind
its labels at the oldest torchvision that hdovd supports, and has no font of its own that can be set larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hdovd.pipelines.common.label_font import label_font

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
