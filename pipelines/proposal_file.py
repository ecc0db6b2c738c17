"""Proposals as COCO results JSON: `[{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}, ...]`."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.coco import ImageBoxes, Skips, clip_box, read_json
from hdovd.errors import HdovdError, shorten


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
    entries = read_json(path, "proposals")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise HdovdError(f"{path} is no proposal file: expected COCO results JSON, a list of {{image_id, bbox: [x, y, w, h], score}}")
    if not entries:
        raise HdovdError(f"{path} holds no proposals; make them with hdovd propose, or leave --proposals out to cache base boxes alone")
    sizes = {image.id: (image.width, image.height) for image in images}
    rows: dict[int, list[tuple[float, list[float]]]] = {}
    for number, entry in enumerate(entries):
        image_id, score = entry["image_id"], entry["score"]
        if image_id not in sizes:
            skips.add("proposal for an image that is not in the training set, image", image_id)
            continue
        box, why = clip_box(entry["bbox"], *sizes[image_id])
        if box is None or not isinstance(score, int | float) or not math.isfinite(score):
            skips.add(f"proposal, {why or 'score is not a finite number'}, entry", number)
            continue
        rows.setdefault(image_id, []).append((float(score), box))
    if not rows:
        raise HdovdError(f"{path} holds no usable proposal for the {len(images)} training images (ids {shorten(list(sizes), 4)}):\n"
                         + "\n".join(skips.lines()))
    return {image_id: _sorted(found) for image_id, found in rows.items()}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("image_id"), int) and {"bbox", "score"} <= entry.keys()


def write_proposals(path: Path, proposals: dict[int, Proposals]) -> int:
    """Write all proposals, image by image, and return how many; the file appears whole or not at all."""
    entries: list[dict[str, Any]] = []
    for image_id, found in proposals.items():
        for (x0, y0, x1, y1), score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True):
            entries.append({"image_id": image_id, "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)], "score": round(score, 5)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(entries))
    os.replace(partial, path)
    return len(entries)


def _sorted(rows: list[tuple[float, list[float]]]) -> Proposals:
    rows = sorted(rows, key=lambda row: -row[0])
    return Proposals(np.array([box for _, box in rows], np.float32), np.array([score for score, _ in rows], np.float32))
