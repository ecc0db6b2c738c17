"""Made-up pictures and boxes in COCO's forms, of any number: what a forecast and benchmarks extract."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hdovd.data.protocol import load_protocol


def make_world(
    folder: Path,
    images: int,
    *,
    base_boxes: int,
    proposals: int,
    size: tuple[int, int],
    pictures: int | None = None,
    file_type: str = "jpg",
) -> None:
    """Write `images/`, annotations.json and proposals.json, item by item: in as little memory for millions as for one.

    Args:
        base_boxes: annotations an image.
        proposals: boxes an image in the other file.
        size: width and height, pixels.
        pictures: how many files there are, which are all images over and over; None: one an image.
    """
    (folder / "images").mkdir(parents=True)
    rng, pictures, (width, height) = np.random.default_rng(0), pictures or images, size
    for number in range(pictures):
        pixels = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / "images" / f"{number}.{file_type}", quality=90)

    def boxes(count: int) -> Iterator[dict[str, object]]:
        for image in range(images):
            found = np.concatenate([rng.uniform(0, 0.6, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))], axis=1) * [
                *size,
                *size,
            ]
            for box, score in zip(found.round(2).tolist(), rng.uniform(0, 1, count).round(4).tolist(), strict=True):
                yield {"image_id": image, "bbox": box, "score": score}

    names = load_protocol("ov-coco").names
    _write(
        folder / "annotations.json",
        {
            "categories": ({"id": number, "name": name} for number, name in enumerate(names, 1)),
            "images": (
                {"id": k, "file_name": f"{k % pictures}.{file_type}", "width": width, "height": height}
                for k in range(images)
            ),
            "annotations": (box | {"id": k, "category_id": 1, "iscrowd": 0} for k, box in enumerate(boxes(base_boxes))),
        },
    )
    _write(folder / "proposals.json", boxes(proposals))


def _write(file: Path, content: Iterator[object] | dict[str, Iterator[object]]) -> None:
    """One list, or several by name, as JSON."""
    lists = content if isinstance(content, dict) else {"": content}
    with file.open("w") as out:
        for number, (name, items) in enumerate(lists.items()):
            out.write((f'{"," if number else "{"} "{name}": ' if name else "") + "[")
            out.writelines((",\n" if k else "") + json.dumps(item) for k, item in enumerate(items))
            out.write("]")
        out.write("}" if isinstance(content, dict) else "")
