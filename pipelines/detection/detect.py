"""Detection of anything that has a name, in any pictures: JSON in COCO's forms, and the pictures with boxes.

`detector` is the same for single pictures in memory.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.version import __version__
from hdovd.pipelines.common.device import workers_for
from hdovd.pipelines.common.images import Decoded, decode
from hdovd.pipelines.common.picture_files import PictureFile, find_pictures, printable
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.dataloading.loader import Batches
from hdovd.pipelines.detection.config import DetectConfig
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.detection.output import DetectionFolder, Tally
from hdovd.pipelines.extraction.text import read_class_embeddings
from hdovd.pipelines.runs.tables import table_lines


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


def detect(job: DetectConfig, log: Callable[[str], None] = print, stdin: BinaryIO | None = None) -> DetectResult:
    """Look for the classes in all pictures and write what is found into `job.out` (`output`).

    stdin: instead of the process's own. Pictures that cannot be read are skipped. Raises HdovdError for bad input.
    """
    job.check()
    files = find_pictures(job.images, stdin or sys.stdin.buffer, job.out, log)
    detector = Detector.from_run(
        job.run,
        weights=job.weights,
        device=job.device,
        clip=job.clip,
        pretrained=job.pretrained,
        templates=job.templates,
        trust=job.trust,
        log=log,
    )
    _set_classes(detector, job, log)
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


def _set_classes(detector: Detector, job: DetectConfig, log: Callable[[str], None]) -> None:
    names = detector.names if job.classes is None else job.classes
    if job.classes is not None:
        for line in _doubtful(job.classes, detector.protocol.names):
            log(line)
    rows = (
        None if job.class_embeddings is None else read_class_embeddings(job.class_embeddings, names, log, each="name")
    )
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
