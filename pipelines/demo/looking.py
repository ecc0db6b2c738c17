"""The last part of the demo: what is looked at, and small copies of the pictures that the README shows."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from hdovd.pipelines.common.atomic_write import write_picture

SHOWN_PICTURES = 3
WIDTH_PX = 900
GAP_PX = 6


def telling_pictures(world: Path, novel: tuple[str, ...]) -> list[Path]:
    """The first validation pictures that hold two novel objects or more, `SHOWN_PICTURES` of them; if there are fewer, then others."""
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    wanted = {c["id"] for c in tree["categories"] if c["name"] in novel}
    counts = {image["id"]: 0 for image in tree["images"]}
    for annotation in tree["annotations"]:
        counts[annotation["image_id"]] += annotation["category_id"] in wanted
    images = sorted(tree["images"], key=lambda image: counts[image["id"]] < 2)[:SHOWN_PICTURES]
    return [world / "val2017" / image["file_name"] for image in images]


def image_with_most_proposals(proposals: Path) -> int:
    """Of equals the first in the file."""
    counts: dict[int, int] = {}
    for entry in json.loads(proposals.read_text()):
        counts[entry["image_id"]] = counts.get(entry["image_id"], 0) + 1
    return max(counts, key=lambda image: counts[image])


def small_pictures(detections: list[Path], view: Path, out: Path) -> list[Path]:
    """Write detections.jpg and cache-view.jpg, `WIDTH_PX` wide, into `out`."""
    files = []
    for name, picture in (("detections.jpg", _side_by_side(detections)), ("cache-view.jpg", _opened(view))):
        files.append(out / name)
        write_picture(files[-1], _narrowed(picture), "JPEG", quality=80, optimize=True)
    return files


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _narrowed(picture: Image.Image) -> Image.Image:
    picture.thumbnail((WIDTH_PX, WIDTH_PX), Image.Resampling.LANCZOS)
    return picture


def _side_by_side(files: list[Path]) -> Image.Image:
    pictures = [_opened(file) for file in files]
    height = min(picture.height for picture in pictures)
    pictures = [p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS) for p in pictures]
    sheet = Image.new("RGB", (sum(p.width + GAP_PX for p in pictures) - GAP_PX, height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return sheet
