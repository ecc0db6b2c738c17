"""A small cache written through the writer, with everything that went in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache.schema import Level, Source
from hdovd.cache.writer import CacheWriter

D = 8


@dataclass(frozen=True)
class Written:
    """What went into a cache: per image its instance columns (embedding float32 included) and image embedding."""

    path: Path
    image_ids: list[int]
    instances: dict[int, dict[str, np.ndarray]]
    images: dict[int, np.ndarray]
    classes: np.ndarray
    inputs: dict[Level, dict[str, Any]]


def unit_rows(rng: np.random.Generator, count: int, dim: int = D) -> np.ndarray:
    rows = rng.normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def instance_columns(rng: np.random.Generator, base: int, extra: int) -> dict[str, np.ndarray]:
    count = base + extra
    corner = rng.uniform(0, 100, (count, 2))
    return {
        "embedding": unit_rows(rng, count),
        "box": np.concatenate([corner, corner + rng.uniform(1, 50, (count, 2))], axis=1).astype(np.float32),
        "source": np.repeat([Source.BASE_BOX, Source.PROPOSAL], [base, extra]).astype(np.uint8),
        "annotation_id": np.concatenate([rng.integers(1, 1 << 40, base), np.full(extra, -1)]).astype(np.int64),
        "score": rng.uniform(size=count).astype(np.float32),
        "noun": rng.integers(-1, 5, count).astype(np.int32),
        "noun_cosine": rng.uniform(-1, 1, count).astype(np.float32),
    }


@pytest.fixture
def write_cache() -> Callable[..., Written]:
    """Write a cache of random rows: `write_cache(path, {image id: (base boxes, proposals)})`."""

    def write(path: Path, counts: dict[int, tuple[int, int]] | None = None, *, seed: int = 0,
              clip: dict[str, Any] | None = None, class_clip: dict[str, Any] | None = None,
              levels: Sequence[Level] = tuple(Level)) -> Written:
        counts = {40: (2, 3), 7: (1, 0), 19: (0, 0), 23: (3, 1)} if counts is None else counts
        clip = {"weights": "w1", "activation": "gelu"} if clip is None else clip
        rng = np.random.default_rng(seed)
        ids = list(counts)
        inputs = {level: {"clip": clip, "level": str(level), "boxes": {"count": 9, "hash": "abc"}} for level in Level}
        inputs[Level.CLASS]["clip"] = class_clip or clip
        instances = {i: instance_columns(rng, *counts[i]) for i in ids}
        images = {i: unit_rows(rng, 1) for i in ids}
        classes, nouns = unit_rows(rng, 3), unit_rows(rng, 5)
        with CacheWriter(path) as writer:
            if Level.CLASS in levels:
                writer.write_names(Level.CLASS, inputs[Level.CLASS], ["cat", "dog", "fire hydrant"], classes)
            if Level.NOUN in levels:
                writer.write_names(Level.NOUN, inputs[Level.NOUN], list("abcde"), nouns)
            if Level.IMAGE in levels:
                level = writer.image_level(inputs[Level.IMAGE], ids, D)
                for i in ids:
                    level.append(i, embedding=images[i])
                level.close({})
            if Level.INSTANCE in levels:
                level = writer.instance_level(inputs[Level.INSTANCE], ids, [sum(counts[i]) for i in ids], D)
                for i in ids:
                    level.append(i, **instances[i])
                level.close({19: "gone.jpg: no such file"} if 19 in counts else {})
        return Written(path, ids, instances, images, classes, inputs)

    return write
