"""Detections as arrays, from COCO results rows in memory or in a file."""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.core.errors import HdovdError
from hdovd.core.json_stream import JsonStream
from hdovd.core.text_files import cut, shown
from hdovd.data.coco import Split, is_finite
from hdovd.evaluation.matching import Found


def found_of(rows: Iterable[Mapping[str, Any]], coco_ids: tuple[int, ...]) -> Found:
    """Arrays of rows that are known to be sound. `coco_ids`: the category id of every class, in label order."""
    label = {coco_id: k for k, coco_id in enumerate(coco_ids)}
    image_ids, labels, boxes, scores = array("q"), array("q"), array("d"), array("d")
    for row in rows:  # one by one: a list of COCO val's takes hundreds of megabytes
        image_ids.append(row["image_id"])
        labels.append(label[row["category_id"]])
        boxes.extend(row["bbox"])
        scores.append(row["score"])
    return Found(
        np.array(image_ids, np.int64), np.array(boxes).reshape(-1, 4), np.array(labels, np.int64), np.array(scores)
    )


def read_found(file: Path, split: Split) -> Found:
    """The detections of a run on the images of a split. Raises HdovdError for a file that is no such thing, naming the
    first fault.
    """
    images, classes = {image.id for image in split.images}, set(split.coco_ids)

    def rows() -> Iterator[Mapping[str, Any]]:
        stream = JsonStream(file, "detections")
        for number, (_, row) in enumerate(stream):
            if None not in stream.lists:
                break
            if fault := _fault(row, images, classes, split):
                raise HdovdError(
                    f"{file}: entry {number}: {fault}; give the data that the run was evaluated on, or run hdovd eval "
                    f"again"
                )
            yield row
        if None not in stream.lists:
            raise HdovdError(f"{file} is no list of detections: run hdovd eval again")

    return found_of(rows(), split.coco_ids)


def _fault(row: Any, images: set[int], classes: set[int], split: Split) -> str:
    if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
        return "a detection has image_id, category_id, bbox and score"
    if type(row["image_id"]) is not int or row["image_id"] not in images:
        return f"it is for image {shown(row['image_id'])}, of which {split.annotations} holds no object of the protocol's classes"  # noqa: E501
    if type(row["category_id"]) is not int or row["category_id"] not in classes:
        return f"category {shown(row['category_id'])} is none of the protocol's"
    box, score = row["bbox"], row["score"]
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite(v) for v in box):
        return f"the box is not four numbers: {cut(str(box))}"
    return "" if is_finite(score) and 0 <= score <= 1 else f"the score is not in 0..1: {shown(score)}"
