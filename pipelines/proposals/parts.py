"""Proposals of a whole split in parts of a thousand images, each written as it is done: a killed pass goes on, and
processes share it.

Beside NAME.json a folder NAME.parts holds them until the file is written.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from hdovd.data.coco import Split
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.proposal_files.file import Proposals

IMAGES = 1024  # of a part, about; half a minute on a GPU


@dataclass(slots=True)
class Part:
    """What was found in the pictures of a part, by image id; `unreadable`: why others could not be read."""

    found: dict[int, Proposals] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of `images` images. `key`: of everything that determines them; those with another key are made again.

    `size`: images of a part, whole batches, so that a batch is the same whatever is there already and however many
    processes share it.
    """

    folder: Path
    images: int
    size: int
    key: str

    @classmethod
    def of(cls, folder: Path, split: Split, batch_size: int, origin: dict[str, Any]) -> "Parts":
        """`origin`: what made the network, and what is kept of what it finds; as JSON has it."""
        rows, images = hashlib.sha256(), len(split.images)
        for image in split.images:
            rows.update(f"{image.id} {len(image.boxes)} ".encode() + image.boxes.tobytes())
        size = batch_size * max(1, IMAGES // batch_size)
        key = hashlib.sha256(
            json.dumps([origin, rows.hexdigest(), size, batch_size], sort_keys=True).encode()
        ).hexdigest()
        return cls(folder, images, size, key)

    def numbers(self) -> range:
        return range(-(-self.images // self.size))

    def rows(self, part: int) -> range:
        """The images of a part, by number."""
        return range(part * self.size, min((part + 1) * self.size, self.images))

    def missing(self) -> list[int]:
        return [part for part in self.numbers() if not self._is_done(part)]

    def write(self, number: int, part: Part) -> None:
        """Raises HdovdError if there is no room."""
        found = part.found.values()
        arrays = {
            "image_id": np.array(list(part.found), np.int64),
            "count": np.array([len(p.scores) for p in found], np.int64),
            "boxes": np.concatenate([np.zeros((0, 4), np.float32), *(p.boxes for p in found)]),
            "scores": np.concatenate([np.zeros(0, np.float32), *(p.scores for p in found)]),
        }
        metadata = {"key": self.key, "unreadable": json.dumps(part.unreadable)}
        replace_file(self._file(number), lambda partial: save_file(arrays, partial, metadata))

    def read(self, number: int) -> Part:
        arrays = load_file(self._file(number))
        ends = arrays["count"].cumsum().tolist()
        found = {
            image_id: Proposals(arrays["boxes"][end - n : end], arrays["scores"][end - n : end])
            for image_id, n, end in zip(arrays["image_id"].tolist(), arrays["count"].tolist(), ends, strict=True)
        }
        return Part(found, list(json.loads(self._metadata(number)["unreadable"])))

    def _is_done(self, number: int) -> bool:
        try:
            return self._file(number).is_file() and self._metadata(number).get("key") == self.key
        except (SafetensorError, OSError):
            return False

    def _metadata(self, number: int) -> dict[str, str]:
        with safe_open(self._file(number), "np") as tensors:
            return dict(tensors.metadata() or {})

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def fill(
    parts: Parts, mine: list[int], results: Iterable[tuple[int, Proposals | str]], check: Callable[[], None]
) -> None:
    """Write the parts `mine` from their images' results, in order: image id, and proposals or why there are none.
    `check` may raise.
    """
    stream: Iterator[tuple[int, Proposals | str]] = iter(results)
    for number in mine:
        part = Part()
        for _ in parts.rows(number):
            image_id, result = next(stream)
            check()
            if isinstance(result, str):
                part.unreadable.append(result)
            else:
                part.found[image_id] = result
        parts.write(number, part)
