"""Detection of anything that has a name, in any pictures: JSON in COCO's forms, and the pictures with boxes.

`detector` is the same for single pictures in memory.

The folder of `hdovd detect`, written picture by picture.

detections.json    COCO results form: [{image_id, category_id, bbox: [x, y, w, h], score}]
images.json        what the ids mean, as a COCO data set without annotations; and which pictures were skipped, and
                   how it was made
pictures/          the pictures with boxes
detections.jsonl   only while it runs, or if it was killed: a line a picture
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.log import log
from hdovd.core.version import __version__
from hdovd.pipelines.common.atomic_write import replace_file, write_picture, writing
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import Decoded, decode
from hdovd.pipelines.common.picture_files import PictureFile, find_pictures, printable
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.detection.config import DETECTIONS_MARKER, DetectConfig
from hdovd.pipelines.detection.detector import Detector, NamedDetections
from hdovd.pipelines.extraction.text import read_class_embeddings
from hdovd.pipelines.runs.listing import table_lines

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


@dataclass(frozen=True, slots=True)
class DetectResult:
    """`names` that were looked for, `is_novel` of each; `skipped`: pictures that could not be read, with the reason."""

    names: tuple[str, ...]
    is_novel: tuple[bool, ...]
    tally: Tally
    skipped: dict[str, str]
    files: list[Path]


class _Opened(NamedTuple):
    """`problem`: why the picture cannot be read; it has no pixels then."""

    number: int
    pixels: Tensor
    width: int
    height: int
    problem: str


class _Pictures(Dataset[_Opened]):
    def __init__(self, files: Sequence[PictureFile]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> _Opened:
        file = self.files[number]
        try:
            picture = decode(file.path if file.data is None else file.data)
        except HdovdError as error:
            return _Opened(number, torch.zeros(3, 0, 0, dtype=torch.uint8), 0, 0, str(error))
        return _Opened(number, picture.pixels, picture.width, picture.height, "")


def detect(job: DetectConfig, stdin: BinaryIO | None = None) -> DetectResult:
    """Look for the classes in all pictures and write what is found into `job.out` (`output`).

    stdin: instead of the process's own. Pictures that cannot be read are skipped. Raises HdovdError for bad input.
    """
    job.check()
    files = find_pictures(job.images, stdin or sys.stdin.buffer, job.out)
    detector = Detector.from_run(
        job.run,
        weights=job.weights,
        device=job.device,
        clip=job.clip,
        pretrained=job.pretrained,
        templates=job.templates,
        trust=job.trust,
    )
    _set_classes(detector, job)
    novel = [bool(one) for one in detector.is_novel.tolist()]
    log(
        f"pictures: {len(files):,d}; names: {len(novel)}, of them base classes of the run: {len(novel) - sum(novel)}: "
        f"{shorten(list(detector.names))}"
    )
    if detector.rivals:
        log(
            f"{len(detector.rivals)} other base classes of the run compete with them, and are not written; --alone "
            f"does without"
        )
    folder = DetectionFolder.begin(job.out, detector.names, novel, draw=job.pictures)
    skipped = _run(detector, files, folder, job)
    written = folder.finish(_info(detector, job))
    return DetectResult(detector.names, tuple(novel), folder.tally, skipped, written)


def _set_classes(detector: Detector, job: DetectConfig) -> None:
    names = detector.names if job.classes is None else job.classes
    if job.classes is not None:
        for line in _doubtful(job.classes, detector.protocol.names):
            log(line)
    rows = None if job.class_embeddings is None else read_class_embeddings(job.class_embeddings, names, each="name")
    detector.set_classes(names, embeddings=rows, split_blind=job.split_blind, alone=job.alone)
    detector.embedder.forget_clip()


def _doubtful(names: Sequence[str], classes: Sequence[str]) -> Iterator[str]:
    """What may be a slip of the pen."""
    known = {name.casefold() for name in classes}
    for name in names:
        if ";" in name or "|" in name:
            yield f"note: {name!r} is taken for one name; names are separated by commas"
        if name.casefold() not in known and (near := get_close_matches(name.casefold(), known, 1, cutoff=0.8)):
            yield f"note: {name!r} is no class of the run; did you mean {near[0]!r}?"


def _run(detector: Detector, files: list[PictureFile], folder: DetectionFolder, job: DetectConfig) -> dict[str, str]:
    """Returns what was skipped."""
    skipped: dict[str, str] = {}
    workers = min(workers_for(detector.device, job.workers), len(files))
    batches = Batches(_Pictures(files), job.batch_size, workers, device=detector.device)
    with progress(None, "detect", "image", total=len(files)) as bar:
        for batch in batches:
            good = [Decoded(one.pixels, one.width, one.height) for one in batch if not one.problem]
            found = iter(zip(good, detector.find(good, job.threshold), strict=True))
            for one in batch:  # in the order of the files
                file = files[one.number]
                if one.problem:
                    skipped[file.name] = one.problem
                    folder.skip(one.number + 1, file.name, one.problem)
                else:
                    picture, detections = next(found)
                    folder.add(one.number + 1, file.name, file.path.stem, picture, detections)
            folder.flush()
            bar.update(len(batch))
    return skipped


def _info(detector: Detector, job: DetectConfig) -> dict[str, Any]:
    """What the detections were made with, for `images.json`."""
    embedded = (
        {"class_embeddings": str(job.class_embeddings)}
        if job.class_embeddings is not None
        else {}
        if job.templates is None
        else {"templates": list(job.templates)}
    )
    return {
        "description": f"hdovd {__version__} detect",
        "run": str(job.run.absolute()),
        "weights": str(job.weights),
        "threshold": job.threshold,
        "split_blind": job.split_blind,
        "rivals": list(detector.rivals),
        "device": str(detector.device),
        **embedded,
    }


SHOWN_NAMES = 30
SHOWN_SKIPPED = 10


def detect_lines(result: DetectResult) -> list[str]:
    """The first pictures with what was found, every name with its count, and what was skipped."""
    tally, lines = result.tally, []
    if tally.rows:
        rows = [
            (printable(row.name), f"{row.size[0]}x{row.size[1]}", str(row.count), row.best or "-") for row in tally.rows
        ]
        lines += table_lines(("picture", "size", "found", "best"), rows, {"size", "found"})
        if tally.images > len(rows):
            lines.append(f"... and {tally.images - len(rows):,d} more pictures, in images.json")
        kind = dict(zip(result.names, result.is_novel, strict=True))
        counts = [
            (name, "novel" if kind[name] else "base", f"{count:,d}", f"{tally.pictures_with[name]:,d}")
            for name, count in tally.objects.most_common(SHOWN_NAMES)
        ]
        lines += ["", *table_lines(("name", "", "found", "in pictures"), counts, {"found", "in pictures"})]
        none = [name for name in result.names if name not in tally.objects]
        if len(tally.objects) > SHOWN_NAMES:
            lines.append(f"... and {len(tally.objects) - SHOWN_NAMES} more names")
        if none:
            lines.append(f"not found: {shorten(list(none), SHOWN_NAMES)}")
    lines.append(f"{counted(tally.images, 'picture')}, {tally.found:,d} found")
    if skipped := list(result.skipped.values()):
        lines += [
            f"{counted(len(skipped), 'picture')} skipped, which cannot be read:",
            *(f"  {printable(reason)}" for reason in skipped[:SHOWN_SKIPPED]),
        ]
        if len(skipped) > SHOWN_SKIPPED:
            lines.append(f"  ... and {len(skipped) - SHOWN_SKIPPED:,d} more, in images.json")
    return lines
