"""Writing a feature cache: a level at a time, in bounded memory, visible under its name only when whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr

from hdovd.cache.identity import KeyInputs, key_of
from hdovd.cache.schema import CHUNK_ROWS, INSTANCE_COLUMNS, SCHEMA_VERSION, SHARD_ROWS, Level
from hdovd.errors import HdovdError

NORM_TOLERANCE = 1e-3


class _Rows:
    """One array that grows by appended rows and is written a shard at a time."""

    def __init__(self, group: zarr.Group, name: str, count: int, dtype: str, extra: tuple[int, ...]) -> None:
        self._array = group.create_array(
            name, shape=(count, *extra), dtype=dtype, chunks=(CHUNK_ROWS, *extra), shards=(SHARD_ROWS, *extra),
            compressors=None, fill_value=0)
        self._pending: list[np.ndarray] = []
        self._written = self._waiting = 0

    def append(self, rows: np.ndarray) -> None:
        self._pending.append(rows)
        self._waiting += len(rows)
        while self._waiting >= SHARD_ROWS:
            self._write(SHARD_ROWS)

    def close(self) -> None:
        self._write(self._waiting)
        if self._written != self._array.shape[0]:
            raise HdovdError(f"cache array {self._array.path} got {self._written} rows, expected {self._array.shape[0]}")

    def _write(self, count: int) -> None:
        if count == 0:
            return
        rows = np.concatenate(self._pending)
        self._array[self._written : self._written + count] = rows[:count]
        self._pending = [rows[count:]]
        self._written += count
        self._waiting -= count


class CacheWriter:
    """A new cache at `path`, built beside it and renamed into place on a clean exit of the `with` block."""

    def __init__(self, path: Path, skipped: dict[str, list[int | str]] | None = None) -> None:
        """`skipped`: ids by reason of what the input files hold and the cache does not, kept with it in full."""
        self.path, self._skipped = path, skipped or {}

    def __enter__(self) -> CacheWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.parent / f".{self.path.name}.partial-{uuid.uuid4().hex[:8]}"
        self._open: list[LevelWriter] = []
        self._root = zarr.create_group(self._partial, attributes={"schema_version": SCHEMA_VERSION, "skipped": self._skipped})
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        unfinished = [level for level in self._open if not level.closed]
        if unfinished:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise HdovdError(f"{self.path}: {len(unfinished)} levels were not closed; nothing was written")
        old = self.path.parent / f".{self.path.name}.old-{uuid.uuid4().hex[:8]}"
        if self.path.exists():
            os.rename(self.path, old)
        os.rename(self._partial, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def copy_level(self, level: Level, source: Path) -> None:
        """Take over a level that did not change from another cache."""
        shutil.copytree(source / level, self._partial / level)

    def write_names(self, level: Level, inputs: KeyInputs, names: Sequence[str], embeddings: np.ndarray) -> None:
        """The class or noun level: embeddings (n, D) float32, L2-normalised."""
        group = self._level(level, inputs, {"names": list(names)})
        rows = _Rows(group, "embedding", len(names), "float16", embeddings.shape[1:])
        rows.append(_normalised(embeddings, lambda i: f"name {names[i]!r}"))
        rows.close()

    def image_level(self, inputs: KeyInputs, image_ids: Sequence[int], dim: int) -> LevelWriter:
        group = self._level(Level.IMAGE, inputs, {})
        group.create_array("image_id", data=np.asarray(image_ids, np.int64))
        columns = {"embedding": _Rows(group, "embedding", len(image_ids), "float16", (dim,))}
        return self._writer(group, columns, image_ids, [1] * len(image_ids))

    def instance_level(self, inputs: KeyInputs, image_ids: Sequence[int], counts: Sequence[int], dim: int) -> LevelWriter:
        """Rows come image by image in the order of `image_ids`, `counts` of them an image."""
        group = self._level(Level.INSTANCE, inputs, {})
        group.create_array("image_id", data=np.asarray(image_ids, np.int64))
        group.create_array("offset", data=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        total = int(sum(counts))
        columns = {"embedding": _Rows(group, "embedding", total, "float16", (dim,))}
        columns |= {name: _Rows(group, name, total, dtype, extra) for name, (dtype, extra) in INSTANCE_COLUMNS.items()}
        return self._writer(group, columns, image_ids, counts)

    def _writer(self, group: zarr.Group, columns: dict[str, _Rows], image_ids: Sequence[int], counts: Sequence[int]) -> LevelWriter:
        self._open.append(LevelWriter(group, columns, image_ids, counts))
        return self._open[-1]

    def _level(self, level: Level, inputs: KeyInputs, attributes: dict[str, Any]) -> zarr.Group:
        return self._root.create_group(level, attributes={"key": key_of(inputs), "key_inputs": inputs, **attributes})


class LevelWriter:
    """Appends rows to the columns of one level, image by image in the order announced; `close` checks that all have come."""

    def __init__(self, group: zarr.Group, columns: dict[str, _Rows], image_ids: Sequence[int], counts: Sequence[int]) -> None:
        self._group, self._columns = group, columns
        self._expected = iter(zip(image_ids, counts, strict=True))
        self.closed = False

    def append(self, image_id: int, **rows: np.ndarray) -> None:
        """Rows of one image, every column of the level; `embedding` (n, D) is float32 and L2-normalised."""
        if rows.keys() != self._columns.keys():
            raise ValueError(f"columns {sorted(rows)}, expected {sorted(self._columns)}")
        expected = next(self._expected, None)
        counts = sorted({len(values) for values in rows.values()})
        if expected is None or image_id != expected[0] or counts != [expected[1]]:
            announced = f"{expected[1]} rows of image {expected[0]}" if expected else "no more"
            raise HdovdError(f"cache level {self._group.path}: got {counts} rows of image {image_id}, expected {announced}")
        rows["embedding"] = _normalised(rows["embedding"], lambda i: f"row {i} of image {image_id}")
        for name, values in rows.items():
            self._columns[name].append(values)

    def close(self, failed: dict[int, str]) -> None:
        """`failed`: image id -> why the image has zero rows in place of embeddings."""
        for column in self._columns.values():
            column.close()
        self._group.attrs["failed"] = {str(k): v for k, v in failed.items()}
        self.closed = True


def _normalised(rows: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """float32 rows as float16; a row that is neither zero (a failed image's) nor of norm one is an error."""
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    wrong = np.flatnonzero(~(np.isclose(norms, 1, atol=NORM_TOLERANCE) | (norms == 0)))
    if len(wrong):
        raise HdovdError(f"embedding of {name(int(wrong[0]))} has norm {norms[wrong[0]]:.4g}, expected 1: the model gave "
                         f"NaN or an overflow; try --precision fp32 ({len(wrong)} rows)")
    return rows.astype(np.float16)
