"""Detections drawn on validation pictures: base classes in blue, novel ones in orange and marked "novel"."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol
from hdovd.modeling.postprocess import Detections
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.evaluation.config import SHOWN_SCORE


def draw_detections(split: Split, detections: list[Detections], protocol: Protocol, folder: Path, count: int) -> list[Path]:
    """Draw the first `count` images that hold a novel object, detections of `SHOWN_SCORE` or more beside the ground truth.

    Returns the PNG files written, `IMAGEID.png` each.
    """
    has_novel = [bool((image.labels >= len(protocol.base)).any()) for image in split.images]
    order = sorted(range(len(has_novel)), key=lambda i: not has_novel[i])[:count]
    files = []
    for i in order:
        image, found = split.images[i], detections[i]
        picture = read_image(split.path(image), image.width, image.height, exif=split.exif)
        shown = found.scores >= SHOWN_SCORE
        left = _draw(picture, found.boxes[shown], found.labels[shown].tolist(), found.scores[shown].tolist(), protocol, "detections")
        truth = _draw(picture, torch.from_numpy(image.boxes), image.labels.tolist(), None, protocol, "ground truth")
        sheet = Image.new("RGB", (left.width * 2 + 8, left.height), "white")
        sheet.paste(left, (0, 0))
        sheet.paste(truth, (left.width + 8, 0))
        files.append(folder / _name(image))
        write_picture(files[-1], sheet, "PNG")
    return files


def _name(image: ImageBoxes) -> str:
    return f"{image.id:012d}.png"


def _draw(picture: Image.Image, boxes: torch.Tensor, labels: list[int], scores: list[float] | None, protocol: Protocol,
          title: str) -> Image.Image:
    shown = []
    for k, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True)):
        novel = label >= len(protocol.base)
        text = protocol.names[label] + (f" {scores[k]:.2f}" if scores is not None else "") + (" novel" if novel else "")
        shown.append(Labelled(tuple(box), text, NOVEL_COLOUR if novel else BASE_COLOUR))
    return draw_boxes(picture, shown, title)
