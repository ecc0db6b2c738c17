"""Detections drawn on validation pictures: base classes in blue, novel ones in orange and marked "novel"."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from hdovd.coco import ImageBoxes, Split
from hdovd.inference import Detections
from hdovd.protocol import Protocol

BASE_COLOUR, NOVEL_COLOUR, TRUTH_COLOUR = (60, 140, 255), (255, 130, 0), (255, 255, 255)
SHOWN_SCORE = 0.3
SMALLEST_WIDTH_PX = 480


def draw_detections(split: Split, detections: list[Detections], protocol: Protocol, folder: Path, count: int) -> list[Path]:
    """Draw the first `count` images that hold a novel object, detections of `SHOWN_SCORE` or more beside the ground truth.

    Returns the PNG files written, `IMAGEID.png` each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    has_novel = [bool((image.labels >= len(protocol.base)).any()) for image in split.images]
    order = sorted(range(len(has_novel)), key=lambda i: not has_novel[i])[:count]
    files = []
    for i in order:
        image, found = split.images[i], detections[i]
        with Image.open(split.path(image)) as file:
            picture = file.convert("RGB")
        shown = found.scores >= SHOWN_SCORE
        left = _draw(picture, found.boxes[shown], found.labels[shown].tolist(), found.scores[shown].tolist(), protocol, "detections")
        truth = _draw(picture, torch.from_numpy(image.boxes), image.labels.tolist(), None, protocol, "ground truth")
        sheet = Image.new("RGB", (left.width * 2 + 8, left.height), "white")
        sheet.paste(left, (0, 0))
        sheet.paste(truth, (left.width + 8, 0))
        files.append(folder / _name(image))
        sheet.save(files[-1])
    return files


def _name(image: ImageBoxes) -> str:
    return f"{image.id:012d}.png"


def _draw(picture: Image.Image, boxes: torch.Tensor, labels: list[int], scores: list[float] | None, protocol: Protocol,
          title: str) -> Image.Image:
    scale = max(1, -(-SMALLEST_WIDTH_PX // picture.width))
    canvas = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14)
    for k, (box, label) in reversed(list(enumerate(zip((boxes * scale).tolist(), labels, strict=True)))):  # the best on top
        novel = label >= len(protocol.base)
        colour = NOVEL_COLOUR if novel else BASE_COLOUR
        text = protocol.names[label] + (f" {scores[k]:.2f}" if scores is not None else "") + (" novel" if novel else "")
        pen.rectangle(box, outline=colour, width=3)
        left, top = min(max(box[0], 0), canvas.width - 1), max(box[1] - 17, 0)
        pen.rectangle((left, top, left + pen.textlength(text, font) + 6, top + 17), fill=colour)
        pen.text((left + 3, top), text, fill="black", font=font)
    pen.rectangle((0, canvas.height - 20, pen.textlength(title, font) + 10, canvas.height), fill="black")
    pen.text((5, canvas.height - 19), title, fill=TRUTH_COLOUR, font=font)
    return canvas
