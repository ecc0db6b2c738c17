"""Proposals as COCO results JSON: `[{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]`."""

from __future__ import annotations

import json
import math
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.coco import ImageBoxes, Skips, clip_box
from hdovd.errors import HdovdError, shorten
from hdovd.json_stream import JsonStream


@dataclass(frozen=True, slots=True)
class Proposals:
    """The proposals of one image, best first: boxes (n, 4) float32 xyxy pixels, scores (n,) float32."""

    boxes: np.ndarray
    scores: np.ndarray


NO_PROPOSALS = Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def read_proposals(path: Path, images: list[ImageBoxes], skips: Skips) -> dict[int, Proposals]:
    """The usable proposals of `images`, by image id; what is left out goes to `skips`.

    Raises HdovdError if the file is not of that form, is empty, or fits none of the images.
    """
    sizes = {image.id: (image.width, image.height) for image in images}
    strange = f"{path} is no proposal file: expected COCO results JSON, a list of {{image_id, bbox: [x, y, w, h], score}}"
    # Boxes and scores by image, flat: 4 million proposals take gigabytes as lists. Scores in double precision, as they sort.
    rows: dict[int, tuple[array[float], array[float]]] = {}
    stream, number = JsonStream(path, "proposals"), -1
    for number, (_, entry) in enumerate(stream):
        if None not in stream.lists or not _is_entry(entry):
            raise HdovdError(strange)
        image_id, score = entry["image_id"], entry["score"]
        if image_id not in sizes:
            skips.add("proposal for an image that is not in the training set, image", image_id)
            continue
        box, why = clip_box(entry["bbox"], *sizes[image_id])
        if box is None or not isinstance(score, int | float) or not math.isfinite(score):
            skips.add(f"proposal, {why or 'score is not a finite number'}, entry", number)
            continue
        if image_id not in rows:
            rows[image_id] = array("f"), array("d")
        rows[image_id][0].extend(box)
        rows[image_id][1].append(score)
    if None not in stream.lists:
        raise HdovdError(strange)
    if number < 0:
        raise HdovdError(f"{path} holds no proposals; make them with hdovd propose, or leave --proposals out to cache base boxes alone")
    if not rows:
        raise HdovdError(f"{path} holds no usable proposal for the {len(images)} training images (ids {shorten(list(sizes), 4)}):\n"
                         + "\n".join(skips.lines()))
    return {image_id: _sorted(*rows.pop(image_id)) for image_id in list(rows)}  # pop: not the whole twice


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("image_id"), int) and {"bbox", "score"} <= entry.keys()


def write_proposals(path: Path, proposals: dict[int, Proposals]) -> int:
    """Write all proposals, image by image, and return how many; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_name(f".{path.name}.partial"), 0
    with partial.open("w") as file:  # entry by entry: millions of them as objects would take gigabytes
        file.write("[")
        for image_id, found in proposals.items():
            for (x0, y0, x1, y1), score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True):
                box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
                file.write(", " * (count > 0) + json.dumps({"image_id": image_id, "bbox": box, "score": round(score, 5)}))
                count += 1
        file.write("]")
    os.replace(partial, path)
    return count


def _sorted(boxes: array[float], scores: array[float]) -> Proposals:
    best = np.argsort(-np.frombuffer(scores), kind="stable")
    return Proposals(np.frombuffer(boxes, np.float32).reshape(-1, 4)[best], np.frombuffer(scores)[best].astype(np.float32))
