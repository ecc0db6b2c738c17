"""Boxes with names and scores, in the forms that labelling tools open, each a folder.

A picture is a dict: id, file_name (in the folder of all pictures), path, width, height, and boxes, each of them a dict:
name, score, sides (left, top, right, bottom in pixels), parts (left, top, width, height in parts of the picture's), and
other, the class that it may rather be of, or "".
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, __version__, counted, log, shorten
from hdovd.core.text_files import JsonStream, checked_name
from hdovd.data import DataPaths, Instances, Split, read_instances
from hdovd.data.coco import clip_box
from hdovd.data.forms.converted import label_of
from hdovd.pipelines.common.atomic_write import write_text, writing
from hdovd.pipelines.common.images import printable
from hdovd.pipelines.common.pages import page
from hdovd.pipelines.label_export.config import ExportLabelsConfig

Pictures = list[dict[str, Any]]


def export_labels(config: ExportLabelsConfig) -> None:
    """Write the boxes in the form that is asked for. Raises HdovdError for bad input."""
    config.check()
    names, pictures = read_boxes(config)
    key = {"fiftyone": "path", "yolo": "id"}.get(config.to, "file_name")  # which its texts hold
    odd = {one["id"]: shown for one in pictures if (shown := printable(f"{one[key]}")) != f"{one[key]}"}
    if odd:
        log(
            f"left out: {counted(len(odd), 'picture')} whose names are no UTF-8, which the texts of {config.to} cannot "
            f"hold, but --to yolo can: {shorten([*odd.values()])}"
        )
    pictures = [one for one in pictures if one["id"] not in odd]
    _WRITERS[config.to](config, names, pictures)
    if lost := [one["path"] for one in pictures if not os.path.isfile(one["path"])]:
        log(f"note: {counted(len(lost), 'picture is', 'pictures are')} not there: {shorten(lost)}; --images says where")
    boxes = sum(len(one["boxes"]) for one in pictures)
    log(f"wrote {config.out}: {counted(boxes, 'box', 'boxes')} on {counted(len(pictures), 'picture')}")


def read_boxes(config: ExportLabelsConfig) -> tuple[dict[str, int], Pictures]:
    """The number of each name, and the pictures that have boxes, or all of hdovd detect. What is left out is told.
    Raises HdovdError for an entry of a file that is not as it should be.
    """
    known, left, every = dict[int, str](), Counter[str](), False
    if Path(config.cache).is_file():
        folder, found, every, entries = _of_file(Path(config.cache), config.data or DataPaths())
        images, known = found.images, found.names
    else:
        cache = FeatureCache(config.cache, config.features)
        split, _ = config.load_for(cache)
        folder, entries = split.folder, _pseudo_boxes(cache, split)
        images = {one.id: (one.file_name, one.width, one.height) for one in split.images}
    pictures: dict[int, dict[str, Any]] = {
        number: {"id": number, "file_name": file, "path": os.path.abspath(folder / file)}
        | {"width": width, "height": height, "boxes": []}
        for number, (file, width, height) in images.items()
    }
    for number, entry in enumerate(entries):
        where = f"{config.cache}: entry {number}"
        try:
            picture, score = pictures[entry["image_id"]], float(entry.get("cosine", entry.get("score")))
            name = entry["name"] if "name" in entry else known[entry["category_id"]]
            x, y, right, lower = entry.get("box") or (0, 0, 0, 0)
            box = entry.get("bbox") or [x, y, right - x, lower - y]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HdovdError(
                f"{where} is not of a picture and category that are known, or lacks image_id, category_id or name, "
                f"bbox or score ({error!r}): expected what hdovd detect, eval or search write, with their data by "
                f"--data, or by --images and --annotations"
            ) from error
        width, height = picture["width"], picture["height"]
        sides, why = clip_box(box, width, height)
        why = why or "without a name" * (not name) or "score is no number" * (not isfinite(score))
        if why or sides is None or score < config.min_score:
            left[why or f"score below {config.min_score:g}"] += 1
            continue
        x, y, right, lower = sides
        picture["boxes"].append(
            {
                "name": checked_name(name, where),
                "score": score,
                "other": entry.get("other", ""),
                "sides": sides,
                "parts": [x / width, y / height, (right - x) / width, (lower - y) / height],
            }
        )
    for why, times in sorted(left.items()):
        log(f"left out: {counted(times, 'box', 'boxes')}: {why}")
    shown = [one for one in pictures.values() if one["boxes"] or every]
    others = {box["name"] for one in shown for box in one["boxes"]}.difference(known.values())
    names = {name: number for number, name in known.items()}
    return names | dict(zip(sorted(others), count(max(known, default=0) + 1), strict=False)), shown


def _of_file(file: Path, data: DataPaths) -> tuple[Path, Instances, bool, Iterator[Any]]:
    """The folder and the data that the entries of a file are of, whether it is all that was looked at, and these."""
    first = next((one for _, one in JsonStream(file, "boxes")), None)
    beside, searched = file.with_name("images.json"), isinstance(first, dict) and "name" in first
    of_detect = beside.is_file() and data.root is None and data.annotations is None
    annotations, folder = (beside, None) if of_detect else data.locate("train2017" if searched else "val2017")
    found = read_instances(annotations, folder, any_bytes=True)
    return (
        folder or _gathered(found, data.images or Path()),
        found,
        of_detect,
        (one for _, one in JsonStream(file, "boxes")),
    )


def _gathered(found: Instances, here: Path) -> Path:
    """The folder of all pictures of `hdovd detect`, to which their names become relative: where it was run; or if one
    is named by an absolute path or lies elsewhere, the last that holds all.
    """
    paths = {number: os.path.abspath(here / name) for number, (name, *_) in found.images.items()}
    elsewhere = any(name.startswith("/") or ".." in name.split("/") for name, *_ in found.images.values())
    folder = os.path.commonpath(map(os.path.dirname, paths.values())) if elsewhere else here
    found.images = {
        number: (os.path.relpath(paths[number], folder), w, h) for number, (_, w, h) in found.images.items()
    }
    return Path(folder)


def _pseudo_boxes(cache: FeatureCache, split: Split) -> Iterator[dict[str, Any]]:
    """As entries of a file; the score is the cosine of crop and noun."""
    nouns = cache.known_nouns()
    for image in split.images:
        rows = cache.instances(image.id)
        for row in np.flatnonzero(rows.noun >= 0).tolist():
            yield {
                "image_id": image.id,
                "box": rows.box[row].tolist(),
                "name": nouns[rows.noun[row]] if nouns else "",
                "score": float(rows.noun_cosine[row]),
            }


def _fiftyone(config: ExportLabelsConfig, names: dict[str, int], pictures: Pictures) -> None:
    labels = {
        one["path"]: [
            {"label": box["name"], "bounding_box": box["parts"], "confidence": box["score"]}
            | {"attributes": {"other": box["other"]} if box["other"] else {}}
            for box in one["boxes"]
        ]
        for one in pictures
    }
    write_text(config.out / "labels.json", json.dumps({"classes": list(names), "labels": labels}))
    (config.out / "data").mkdir()  # the importer wants one, though it takes paths


def _label_studio(config: ExportLabelsConfig, names: dict[str, int], pictures: Pictures) -> None:
    sides = ("x", "y", "width", "height")
    tasks = [
        {
            "data": {"image": config.image_prefix + quote(one["file_name"])},
            "predictions": [
                {
                    "model_version": f"hdovd {__version__}",
                    "score": min(max([0.0, *(box["score"] for box in one["boxes"])]), 1.0),
                    "result": [
                        {
                            "id": str(number),
                            "type": "rectanglelabels",
                            "from_name": "label",
                            "to_name": "image",
                            "original_width": one["width"],
                            "original_height": one["height"],
                            "image_rotation": 0,
                            "value": {key: 100 * part for key, part in zip(sides, box["parts"], strict=True)}
                            | {"rotation": 0, "rectanglelabels": [box["name"]]},
                            "score": box["score"],
                            "meta": {"text": [box["other"]] if box["other"] else []},
                        }
                        for number, box in enumerate(one["boxes"])
                    ],
                }
            ],
        }
        for one in pictures
    ]
    write_text(config.out / "labels.xml", page("label-studio.xml", {"names": names}))
    write_text(config.out / "tasks.json", json.dumps(tasks))


def _cvat(config: ExportLabelsConfig, names: dict[str, int], pictures: Pictures) -> None:
    attributes = [{"name": one, "input_type": "text", "mutable": False, "values": [""]} for one in ("score", "other")]
    labels = [{"name": name, "attributes": attributes} for name in names]
    write_text(config.out / "labels.json", json.dumps(labels, indent=1))
    write_text(config.out / "annotations.xml", page("cvat.xml", {"names": names, "pictures": pictures}))


def _yolo(config: ExportLabelsConfig, names: dict[str, int], pictures: Pictures) -> None:
    place, owners = {name: number for number, name in enumerate(names)}, dict[str, str]()
    for one in pictures:
        label, link = label_of(f"images/{one['file_name']}"), config.out / "images" / one["file_name"]
        if (owner := owners.setdefault(label, one["file_name"])) != one["file_name"]:
            raise HdovdError(f"{owner} and {one['file_name']} have one file of labels in YOLO's form: rename one")
        boxes = [(place[box["name"]], *box["parts"], box["score"]) for box in one["boxes"]]
        lines = [f"{k} {x + w / 2:.9f} {y + h / 2:.9f} {w:.9f} {h:.9f}\n" for k, x, y, w, h, _ in boxes]
        scored = [f"{line[:-1]} {score:.9f}\n" for line, (*_, score) in zip(lines, boxes, strict=True)]
        write_text(config.out / label, "".join(lines))
        write_text(config.out / "predictions" / label, "".join(scored))
        with writing(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(one["path"])
    settings = {"train": "images", "val": None, "names": list(names)}
    write_text(config.out / "data.yaml", yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def _coco(config: ExportLabelsConfig, names: dict[str, int], pictures: Pictures) -> None:
    boxes = [
        {"image_id": one["id"], "category_id": names[box["name"]], "bbox": [x, y, right - x, lower - y]}
        | {"area": (right - x) * (lower - y), "iscrowd": 0, "score": box["score"], "other": box["other"]}
        for one in pictures
        for box in one["boxes"]
        for x, y, right, lower in [box["sides"]]
    ]
    tree = {
        "images": [{key: one[key] for key in ("id", "file_name", "width", "height")} for one in pictures],
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes, start=1)],
        "categories": [{"id": number, "name": name} for name, number in names.items()],
    }
    write_text(config.out / "instances.json", json.dumps(tree))


_WRITERS = {"fiftyone": _fiftyone, "label-studio": _label_studio, "cvat": _cvat, "yolo": _yolo, "coco": _coco}
