"""Detection of anything that has a name, in any pictures and videos: JSON in COCO's forms, and the pictures with boxes.

`detector` is the same for single pictures in memory.

The folder is written picture by picture:

detections.json    COCO results form: [{image_id, category_id, bbox: [x, y, w, h], score}]
images.json        what the ids mean, as a COCO data set without annotations; and which pictures were skipped, and
                   how it was made
pictures/          the pictures with boxes
videos/            of each video NAME.jsonl, a line a frame, and NAME.mp4, with boxes
detections.jsonl   only while it runs, or if it was killed: a line a picture
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, BinaryIO

from PIL import Image

from hdovd.core import HdovdError, __version__, counted, log, shorten
from hdovd.pipelines.common.atomic_write import replace_file, write_picture, writing
from hdovd.pipelines.common.console import duration, progress
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.drawing import BASE_COLOUR, NOVEL_COLOUR, Labelled, draw_boxes
from hdovd.pipelines.common.images import VIDEO_ENDINGS, Decoded, PictureFile, decode, find_pictures, printable
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.detection.config import DETECTIONS_MARKER, DetectConfig
from hdovd.pipelines.detection.detector import Detector, NamedDetections
from hdovd.pipelines.evaluation.evaluate import Mapped
from hdovd.pipelines.extraction.identities import read_class_embeddings
from hdovd.pipelines.runs import table_lines

LINES, DETECTIONS, IMAGES = "detections.jsonl", "detections.json", "images.json"
PICTURES, VIDEOS = "pictures", "videos"
SHOWN_ROWS = 20


class DetectionFolder:
    """Takes detections picture by picture: what it keeps in memory does not grow with their number, but for the names
    of drawn files.

    `names` that are looked for, `is_novel` of each; `images`: how many could be read; `rows` of a table of the first
    `SHOWN_ROWS` of them; `objects` and `pictures_with`, frames of videos too, by name; `skipped`: what could not be
    read, with the reason; `videos`: what to say of each; `stopped`: the signal that ended the last one, or 0; `files`
    that were written.
    """

    def __init__(self, path: Path, names: Sequence[str], is_novel: Sequence[bool], *, draw: bool) -> None:
        """Start anew; old detections go. names, is_novel: of the K names asked for. draw: pictures too. Raises
        HdovdError.
        """
        self.path, self.names, self.is_novel = path, tuple(names), tuple(is_novel)
        self.objects, self.pictures_with = Counter[str](), Counter[str]()
        self.images, self.stopped, self.rows = 0, 0, list[tuple[str, ...]]()
        self.skipped, self.videos, self.files = dict[str, str](), dict[str, str](), list[Path]()
        self._draw, self._taken = draw, set[str]()
        with writing(path):
            if (path / DETECTIONS_MARKER).is_file():
                for name in (LINES, DETECTIONS, IMAGES):
                    (path / name).unlink(missing_ok=True)
                for name in (PICTURES, VIDEOS):
                    shutil.rmtree(path / name, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            (path / DETECTIONS_MARKER).touch()
            self._lines: IO[str] = (path / LINES).open("w", buffering=1)  # a line is in it when it is added

    def add(self, image_id: int, file: PictureFile, picture: Decoded, found: NamedDetections) -> None:
        """image_id: from 1 on."""
        image = {"id": image_id, "file_name": file.name, "width": picture.width, "height": picture.height}
        if self._draw:
            drawn = self.place(PICTURES, file.path.stem, ".jpg")
            write_picture(drawn, self.draw(picture, found), "JPEG", quality=90, subsampling=0)
            image["drawn"] = f"{PICTURES}/{drawn.name}"
        scores = found.scores.tolist()
        detections = [
            {"image_id": image_id, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            for (x0, y0, x1, y1), score, label in zip(found.boxes.tolist(), scores, found.labels.tolist(), strict=True)
        ]
        self._add({"image": image, "detections": detections})
        self.images += 1
        self.count([found])
        if len(self.rows) < SHOWN_ROWS:
            best = [f"{name} {score:.2f}" for name, score in zip(found.names, scores, strict=True)]
            size = f"{picture.width}x{picture.height}"
            self.rows.append((printable(file.name), size, str(len(best)), shorten(best, 4) or "-"))

    def add_video(self, file: PictureFile, video: dict[str, Any]) -> None:
        """video: what images.json says of it."""
        self._add({"video": {"file_name": file.name} | video})
        about = f"{counted(video['frames'], 'frame')} of {video['width']}x{video['height']}"
        self.videos[file.name] = "\n  ".join([f"{about} in {duration(video['seconds'])}", *video["notes"]])

    def count(self, found: list[NamedDetections]) -> list[NamedDetections]:
        """What is found in pictures, or frames; returns it."""
        self.objects.update(name for one in found for name in one.names)
        self.pictures_with.update(name for one in found for name in {*one.names})
        return found

    def skip(self, image_id: int, file: PictureFile, reason: str) -> None:
        """A picture or a video that cannot be read."""
        self.skipped[file.name] = reason
        self._add({"skipped": {"id": image_id, "file_name": file.name, "reason": reason}})

    def finish(self, info: dict[str, Any]) -> "DetectionFolder":
        """Write detections.json and images.json."""
        with writing(self.path / LINES):
            self._lines.close()
        head: dict[str, Any] = {
            "info": info,
            "categories": [
                {"id": number, "name": name, "supercategory": "novel" if novel else "base"}
                for number, (name, novel) in enumerate(zip(self.names, self.is_novel, strict=True), start=1)
            ],
            "annotations": [],
        }
        detections, images = self.path / DETECTIONS, self.path / IMAGES
        replace_file(detections, lambda file: _write(file, _list(self._read("detections"))))
        lists = {"images": self._read("image"), "videos": self._read("video"), "skipped": self._read("skipped")}
        replace_file(images, lambda file: _write(file, _tree(head, lists)))
        (self.path / LINES).unlink()
        self.files += [file for file in (detections, images, self.path / PICTURES, self.path / VIDEOS) if file.exists()]
        return self

    def _add(self, line: dict[str, Any]) -> None:
        with writing(self.path / LINES):
            self._lines.write(json.dumps(line) + "\n")

    def _read(self, key: str) -> Iterator[Any]:
        """What the lines hold under this key; of lists the items."""
        with (self.path / LINES).open() as file:
            for line in map(json.loads, file):
                found = line.get(key, [])
                yield from found if isinstance(found, list) else [found]

    def place(self, folder: str, stem: str, ending: str) -> Path:
        """A file in a folder of this one, called `stem` if nothing else there is called so."""
        names = chain([stem], (f"{stem}-{number}" for number in count(2)))  # a/x.jpg and b/x.jpg, or x.jpg and x.png
        name = next(name for name in names if f"{folder}/{name}".casefold() not in self._taken)
        self._taken.add(f"{folder}/{name}".casefold())
        return self.path / folder / f"{name}{ending}"

    def draw(self, picture: Decoded, found: NamedDetections) -> Image.Image:
        """The picture with its boxes, reduced as it was for the detector."""
        canvas = Image.fromarray(picture.pixels.permute(1, 2, 0).contiguous().numpy())
        scale = found.boxes.new_tensor([canvas.width / picture.width, canvas.height / picture.height]).repeat(2)
        rows = zip(
            (found.boxes * scale).tolist(), found.scores.tolist(), found.labels.tolist(), found.names, strict=True
        )
        colours = [NOVEL_COLOUR if novel else BASE_COLOUR for novel in self.is_novel]
        return draw_boxes(canvas, [Labelled(box, f"{name} {score:.2f}", colours[k]) for box, score, k, name in rows])


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


def _opened(file: PictureFile) -> Decoded | str:
    """The picture, or why it cannot be read."""
    try:
        return decode(file.path if file.data is None else file.data)
    except HdovdError as error:
        return f"{error}{', nor an MPEG-TS video' * (file.path.suffix.lower() in VIDEO_ENDINGS)}"


def detect(job: DetectConfig, stdin: BinaryIO | None = None) -> DetectionFolder:
    """Look for the classes in all pictures and write what is found into `job.out` (`output`).

    stdin: instead of the process's own. Pictures that cannot be read are skipped. Raises HdovdError for bad input.
    """
    job.check()
    files = find_pictures(job.images, stdin or sys.stdin.buffer, job.out, videos=find_spec("av") is not None)
    pictures, videos = ([file for file in files if file.is_video is wanted] for wanted in (False, True))
    watch = import_module("hdovd.pipelines.detection.video").detect_in_video if videos else None  # or an error, at once
    detector = Detector.from_run(
        job.run,
        weights=job.weights,
        device=job.device,
        clip=job.clip,
        pretrained=job.pretrained,
        templates=job.templates,
        trust=job.trust,
    )
    if job.examples is None:
        names = detector.names if job.classes is None else job.classes
        rows = None if job.class_embeddings is None else read_class_embeddings(job.class_embeddings, names, each="name")
        detector.set_classes(names, embeddings=rows, split_blind=job.split_blind, alone=job.alone)
    else:
        detector.set_examples(
            job.examples,
            images=job.example_images,
            names=job.classes or (),
            mix=job.mix,
            split_blind=job.split_blind,
            alone=job.alone,
        )
    detector.embedder.forget_clip()
    novel, also = detector.is_novel.tolist(), f"videos: {len(videos):,d}; " if videos else ""
    log(
        f"pictures: {len(pictures):,d}; {also}names: {len(novel)}, of them base classes of the run: "
        f"{len(novel) - sum(novel)}: {shorten(list(detector.names))}"
    )
    if detector.rivals:
        log(
            f"{len(detector.rivals)} other base classes of the run compete with them, and are not written; --alone "
            f"does without"
        )
    folder = DetectionFolder(job.out, detector.names, novel, draw=job.pictures)
    _run(detector, pictures, folder, job)
    _run_videos(detector, dict(enumerate(videos, start=len(pictures) + 1)), folder, job, watch)
    return folder.finish(
        {
            "description": f"hdovd {__version__} detect",
            "run": str(job.run.absolute()),
            "weights": str(job.weights),
            "threshold": job.threshold,
            "split_blind": job.split_blind,
            "rivals": list(detector.rivals),
            "device": str(detector.device),
            **({} if job.class_embeddings is None else {"class_embeddings": str(job.class_embeddings)}),
            **({} if job.templates is None else {"templates": list(job.templates)}),
            **({} if job.examples is None else {"examples": str(job.examples), "mix": job.mix}),
        }
    )


def _run(detector: Detector, files: list[PictureFile], folder: DetectionFolder, job: DetectConfig) -> None:
    workers, numbered = min(workers_for(detector.device, job.workers), len(files)), enumerate(files, start=1)
    batches = Batches(Mapped(files, _opened), job.batch_size, workers, device=detector.device)
    with progress(None, "detect", "image", total=len(files)) as bar:
        for batch in batches:
            found = iter(detector.find([one for one in batch if isinstance(one, Decoded)], job.threshold))
            for one in batch:  # in the order of the files
                number, file = next(numbered)
                if isinstance(one, str):
                    folder.skip(number, file, one)
                else:
                    folder.add(number, file, one, next(found))
            bar.update(len(batch))


def _run_videos(
    detector: Detector, videos: dict[int, PictureFile], folder: DetectionFolder, job: DetectConfig, watch: Any
) -> None:
    """One after the other, by their ids. A signal ends the one that is being read, and all is written."""
    with StopSignal() as stop:
        for number, file in videos.items():
            found = (
                "not read, stopped before"
                if stop.received
                else watch(
                    file,
                    folder.place(VIDEOS, file.path.stem, ""),
                    look=lambda pictures: folder.count(detector.find(pictures, job.threshold)),
                    draw=folder.draw if job.pictures else None,
                    batch_size=job.batch_size,
                    every=job.every,
                    stop=stop,
                )
            )
            if isinstance(found, str):
                folder.skip(number, file, f"{file.name}: {found}")
            else:
                folder.add_video(file, found)
    folder.stopped = stop.received


SHOWN_NAMES = 30
SHOWN_SKIPPED = 10


def detect_lines(result: DetectionFolder) -> list[str]:
    """The first pictures with what was found, every name with its count, and what was skipped."""
    lines, skipped = list[str](), list(result.skipped.values())
    if result.rows:
        lines += table_lines(("picture", "size", "found", "best"), result.rows, {"size", "found"})
        if result.images > len(result.rows):
            lines.append(f"... and {result.images - len(result.rows):,d} more pictures, in images.json")
    lines += [f"{printable(name)}: {about}" for name, about in result.videos.items()]
    if lines:
        counts = [
            (
                name,
                "novel" if result.is_novel[result.names.index(name)] else "base",
                f"{times:,d}",
                f"{result.pictures_with[name]:,d}",
            )
            for name, times in result.objects.most_common(SHOWN_NAMES)
        ]
        places = "in pictures and frames" if result.videos else "in pictures"
        lines += ["", *table_lines(("name", "", "found", places), counts, {"found", places})]
        if len(result.objects) > SHOWN_NAMES:
            lines.append(f"... and {len(result.objects) - SHOWN_NAMES} more names")
        if none := [name for name in result.names if name not in result.objects]:
            lines.append(f"not found: {shorten(list(none), SHOWN_NAMES)}")
    videos = f" and {counted(len(result.videos), 'video')}" if result.videos else ""
    lines.append(f"{counted(result.images, 'picture')}{videos}, {result.objects.total():,d} found")
    if skipped:
        lines += [
            f"{counted(len(skipped), 'file')} skipped, which cannot be read:",
            *(f"  {printable(reason)}" for reason in skipped[:SHOWN_SKIPPED]),
        ]
    if len(skipped) > SHOWN_SKIPPED:
        lines.append(f"  ... and {len(skipped) - SHOWN_SKIPPED:,d} more, in images.json")
    return lines
