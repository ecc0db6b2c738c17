"""The folder of `hdovd detect`, written picture by picture.

detections.json    COCO results form: [{image_id, category_id, bbox: [x, y, w, h], score}]
images.json        what the ids mean, as a COCO data set without annotations; and which pictures were skipped, and
                   how it was made
pictures/          the pictures with boxes
detections.jsonl   only while it runs, or if it was killed: a line a picture
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from hdovd.pipelines.common.atomic_write import replace_file, write_picture, writing
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import Decoded
from hdovd.pipelines.detection.config import DETECTIONS_MARKER
from hdovd.pipelines.detection.detector import NamedDetections

LINES, DETECTIONS, IMAGES, PICTURES = "detections.jsonl", "detections.json", "images.json", "pictures"
SHOWN_ROWS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One picture in the table that is printed. `best`: the names of its best detections, with scores."""

    name: str
    size: tuple[int, int]
    count: int
    best: str


@dataclass(slots=True)
class Tally:
    """What was found so far: `rows` of the first `SHOWN_ROWS` pictures, `objects` and `pictures_with` by name."""

    images: int = 0
    found: int = 0
    rows: list[Row] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)
    pictures_with: Counter[str] = field(default_factory=Counter)


class DetectionFolder:
    """Takes detections picture by picture: what it keeps in memory does not grow with their number, but for the names
    of drawn files.
    """

    def __init__(self, path: Path, names: Sequence[str], is_novel: Sequence[bool], *, draw: bool) -> None:
        """See `begin`."""
        self.path, self.tally = path, Tally()
        self._names, self._novel, self._draw = tuple(names), tuple(is_novel), draw
        self._taken: set[str] = set()
        self._lines: IO[str] = (path / LINES).open("w")

    @classmethod
    def begin(cls, path: Path, names: Sequence[str], is_novel: Sequence[bool], *, draw: bool) -> "DetectionFolder":
        """Start anew; old detections go. names, is_novel: of the K names asked for. draw: pictures too. Raises
        HdovdError.
        """
        with writing(path):
            if (path / DETECTIONS_MARKER).is_file():
                for name in (LINES, DETECTIONS, IMAGES):
                    (path / name).unlink(missing_ok=True)
                shutil.rmtree(path / PICTURES, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            (path / DETECTIONS_MARKER).touch()
            return cls(path, names, is_novel, draw=draw)

    def add(self, image_id: int, file_name: str, stem: str, picture: Decoded, found: NamedDetections) -> None:
        """image_id: from 1 on. stem: what the drawn picture is called, if nothing else is called so."""
        drawn = self._drawn(stem, picture, found) if self._draw else None
        boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in found.boxes.tolist()]
        image = {"id": image_id, "file_name": file_name, "width": picture.width, "height": picture.height}
        found_here = [
            {"image_id": image_id, "category_id": label + 1, "bbox": box, "score": score}
            for box, score, label in zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True)
        ]
        self._add({"image": image | ({"drawn": drawn} if drawn else {}), "detections": found_here})
        tally = self.tally
        tally.images, tally.found = tally.images + 1, tally.found + len(found.names)
        tally.objects.update(found.names)
        tally.pictures_with.update(set(found.names))
        if len(tally.rows) < SHOWN_ROWS:
            best = [f"{name} {score:.2f}" for name, score in zip(found.names[:4], found.scores.tolist(), strict=False)]
            more = len(found.names) - len(best)
            tally.rows.append(
                Row(
                    file_name,
                    (picture.width, picture.height),
                    len(found.names),
                    ", ".join(best) + (f" and {more} more" if more else ""),
                )
            )

    def skip(self, image_id: int, file_name: str, reason: str) -> None:
        """A picture that cannot be read."""
        self._add({"skipped": {"id": image_id, "file_name": file_name, "reason": reason}})

    def flush(self) -> None:
        """What was added is in the file when this returns."""
        with writing(self.path / LINES):
            self._lines.flush()

    def finish(self, info: dict[str, Any]) -> list[Path]:
        """Write detections.json and images.json; returns what is in the folder."""
        with writing(self.path / LINES):
            self._lines.close()
        categories = [
            {"id": row + 1, "name": name, "supercategory": "novel" if novel else "base"}
            for row, (name, novel) in enumerate(zip(self._names, self._novel, strict=True))
        ]
        head: dict[str, Any] = {"info": info, "categories": categories, "annotations": []}
        lists = {
            "images": (line["image"] for line in self._read() if "image" in line),
            "skipped": (line["skipped"] for line in self._read() if "skipped" in line),
        }
        replace_file(self.path / DETECTIONS, lambda file: _write(file, _list(self._detections())))
        replace_file(self.path / IMAGES, lambda file: _write(file, _tree(head, lists)))
        (self.path / LINES).unlink()
        return [self.path / DETECTIONS, self.path / IMAGES, *([self.path / PICTURES] if self._taken else [])]

    def _detections(self) -> Iterator[dict[str, Any]]:
        return (found for line in self._read() for found in line.get("detections", ()))

    def _add(self, line: dict[str, Any]) -> None:
        with writing(self.path / LINES):
            self._lines.write(json.dumps(line) + "\n")

    def _read(self) -> Iterator[dict[str, Any]]:
        with (self.path / LINES).open() as file:
            yield from map(json.loads, file)

    def _drawn(self, stem: str, picture: Decoded, found: NamedDetections) -> str:
        """Draws the picture, reduced as it was for the detector; returns the name of the file."""
        name, number = stem, 1
        while name.casefold() in self._taken:  # a/x.jpg and b/x.jpg, or x.jpg and x.png
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name.casefold())
        canvas = Image.fromarray(picture.pixels.permute(1, 2, 0).contiguous().numpy())
        x, y = canvas.width / picture.width, canvas.height / picture.height
        boxes = []
        for box, score, label, text in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names, strict=True
        ):
            place = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
            boxes.append(Labelled(place, f"{text} {score:.2f}", NOVEL_COLOUR if self._novel[label] else BASE_COLOUR))
        file = self.path / PICTURES / f"{name}.jpg"
        write_picture(file, draw_boxes(canvas, boxes), "JPEG", quality=90, subsampling=0)
        return f"{PICTURES}/{file.name}"


def _write(file: Path, pieces: Iterable[str]) -> None:
    with file.open("w") as out:
        out.writelines(pieces)


def _list(items: Iterable[Any]) -> Iterator[str]:
    """A JSON list, an item a line."""
    yield "["
    for number, item in enumerate(items):
        yield ("," if number else "") + "\n" + json.dumps(item)
    yield "\n]"


def _tree(head: Mapping[str, Any], lists: Mapping[str, Iterable[Any]]) -> Iterator[str]:
    """A JSON object: `head`, and lists that need not fit into memory."""
    yield json.dumps(head)[:-1]
    for name, items in lists.items():
        yield f',\n"{name}": '
        yield from _list(items)
    yield "}\n"
