"""A small cache written through the writer and the catalog, with everything that went in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import DEFAULT_SET, PART_ROWS, TABLE_ARRAYS, Catalog, FeatureSet, KeyInputs, Level, Source, key_of
from hdovd.cache.schema import ROW_ARRAYS
from hdovd.cache.writer import ProductWriter

D = 8


@dataclass(frozen=True)
class Written:
    """What went into a cache: per image its columns (embedding as stored, float16) and image embedding; `arrays` as one
    table each.
    """

    path: Path
    image_ids: list[int]
    instances: dict[int, dict[str, np.ndarray]]
    images: dict[int, np.ndarray]
    arrays: dict[Level, dict[str, np.ndarray]]
    inputs: dict[Level, KeyInputs]


def unit_rows(rng: np.random.Generator, count: int, dim: int = D) -> np.ndarray:
    rows = rng.normal(size=(count, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float16)


def _instance_columns(rng: np.random.Generator, base: int, extra: int) -> dict[str, np.ndarray]:
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


def _all_inputs(clip: KeyInputs, class_clip: KeyInputs) -> dict[Level, KeyInputs]:
    boxes = {"count": 9, "hash": "abc"}
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {"boxes": boxes},
        Level.INSTANCE: {"clip": clip, "boxes": boxes, "crop": "box"},
        Level.IMAGE: {"clip": clip},
        Level.CLASS: {"clip": class_clip, "templates": ["a {}"]},
        Level.NOUN: {"clip": clip, "templates": ["a {}"], "names": "nouns"},
    }
    inputs[Level.PSEUDO_LABEL] = {"instance": key_of(inputs[Level.INSTANCE]), "noun": key_of(inputs[Level.NOUN])}
    return inputs


@pytest.fixture
def write_cache() -> Callable[..., Written]:
    """Write a set of random rows: `write_cache(path, {image id: (base boxes, proposals)})`. Images in `failed` have
    rows of zeros.
    """

    def write(
        path: Path,
        counts: dict[int, tuple[int, int]] | None = None,
        *,
        seed: int = 0,
        part_rows: int = PART_ROWS,
        clip: KeyInputs | None = None,
        class_clip: KeyInputs | None = None,
        failed: dict[int, str] | None = None,
        levels: Sequence[Level] = tuple(Level),
        inputs: dict[Level, KeyInputs] | None = None,
        features: str = DEFAULT_SET,
    ) -> Written:
        counts = {40: (2, 3), 7: (1, 0), 19: (0, 0), 23: (3, 1)} if counts is None else counts
        clip, failed = {"weights": "w1", "activation": "gelu"} if clip is None else clip, failed or {}
        rng, ids = np.random.default_rng(seed), list(counts)
        all_inputs = _all_inputs(clip, class_clip or clip) | (inputs or {})
        instances = {i: _instance_columns(rng, *counts[i]) for i in ids}
        images = {i: unit_rows(rng, 1) for i in ids}
        for i in failed:
            instances[i]["embedding"][:] = images[i][:] = 0
        columns: dict[str, np.ndarray] = {
            name: np.concatenate([instances[i][name] for i in ids]) for name in instances[ids[0]]
        }
        columns |= {
            "image_id": np.array(ids, np.int64),
            "image_hash": np.array(ids, np.uint64) * np.uint64(977),
            "image_size": np.array([(100 + i, 200) for i in ids], np.int32),
            "offset": np.concatenate([[0], np.cumsum([sum(counts[i]) for i in ids])]).astype(np.int64),
        }
        embeddings = {
            Level.CLASS: unit_rows(rng, 3),
            Level.NOUN: unit_rows(rng, 5),
            Level.IMAGE: np.concatenate(list(images.values())),
            Level.INSTANCE: columns["embedding"],
        }
        names = {Level.CLASS: ["cat", "dog", "fire hydrant"], Level.NOUN: list("abcde")}
        owner = {Level.IMAGE: np.array(ids), Level.INSTANCE: np.repeat(ids, np.diff(columns["offset"]))}
        catalog, arrays = Catalog.create(path), dict[Level, dict[str, np.ndarray]]()
        for level in levels:
            own = columns | ({"embedding": embeddings[level]} if level in embeddings else {})
            arrays[level] = {name: own[name] for name in (*TABLE_ARRAYS[level], *ROW_ARRAYS[level])}
            rows = len(own[next(iter(ROW_ARRAYS[level]), "box")])
            writer = ProductWriter.begin(
                catalog.folder,
                level,
                all_inputs[level],
                rows=rows,
                part_rows=part_rows,
                dim=D if level in embeddings else 0,
                names=names.get(level),
                tables={name: arrays[level][name] for name in TABLE_ARRAYS[level]},
            )
            for part in range(writer.product.parts):
                start, stop = writer.product.rows_of(part)
                writer.write_part(
                    part,
                    {name: arrays[level][name][start:stop] for name in ROW_ARRAYS[level]},
                    {i: failed[i] for i in failed if level in owner and i in owner[level][start:stop]},
                )
        catalog.write_set(features, FeatureSet({level: key_of(all_inputs[level]) for level in levels}))
        return Written(path, ids, instances, {i: images[i][0] for i in ids}, arrays, all_inputs)

    return write


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., ProductWriter]:
    """Begin a product of the class or the instance level in the cache `tmp_path/cache`, with changes to the
    arguments."""

    def run(level: Level = Level.CLASS, **changes: Any) -> ProductWriter:
        tables = {
            "image_id": np.array([80, 81]),
            "image_hash": np.array([1, 2], np.uint64),
            "offset": np.array([0, 1, 4]),
            "box": np.ones((4, 4), np.float32),
        }
        values: dict[str, Any] = {"rows": 4, "part_rows": 4, "dim": D}
        values |= {"names": ["cat", "dog", "cow", "hen"]} if level is Level.CLASS else {"tables": tables}
        folder = Catalog.create(tmp_path / "cache").folder
        return ProductWriter.begin(folder, level, {"clip": "c", "level": str(level)}, **(values | changes))

    return run
