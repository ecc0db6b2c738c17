"""Reading a feature cache: whole small tables in memory, embeddings by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from hdovd.cache.identity import KeyInputs, differences, key_of
from hdovd.cache.schema import INSTANCE_COLUMNS, SCHEMA_VERSION, Level, Source
from hdovd.errors import HdovdError

HELD_IN_MEMORY_BYTES = 256 * 2**20  # instance embeddings up to this size are read once, larger ones an image at a time


@dataclass(frozen=True, slots=True)
class InstanceRows:
    """The rows of one image, base boxes first, then proposals best first; arrays of `schema.INSTANCE_COLUMNS`.

    `embedding` (n, D) float32.
    """

    embedding: np.ndarray
    box: np.ndarray
    source: np.ndarray
    annotation_id: np.ndarray
    score: np.ndarray
    noun: np.ndarray
    noun_cosine: np.ndarray

    def select(self, rows: np.ndarray) -> InstanceRows:
        """These rows: an index or a mask."""
        return InstanceRows(*(getattr(self, name)[rows] for name in self.__slots__))

    def base_boxes(self) -> InstanceRows:
        return self.select(self.source == Source.BASE_BOX)

    def proposals(self) -> InstanceRows:
        return self.select(self.source == Source.PROPOSAL)


class FeatureCache:
    """A cache that is whole. Safe to use in DataLoader workers: a copy opens its own handles."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "zarr.json").is_file():
            raise HdovdError(f"no feature cache at {path}: make one with hdovd extract-clip --cache {path}")
        self._root = zarr.open_group(self.path, mode="r")
        version = self._root.attrs.get("schema_version")
        if version != SCHEMA_VERSION:
            raise HdovdError(f"{path} has cache schema {version}, this hdovd reads {SCHEMA_VERSION}: extract it again")
        self._tables: dict[str, np.ndarray] = {}
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def levels(self) -> list[Level]:
        return [level for level in Level if level in self._root]

    def key(self, level: Level) -> str:
        return str(self._group(level).attrs["key"])

    def key_inputs(self, level: Level) -> KeyInputs:
        """What made the level. Raises HdovdError if they were changed since."""
        attributes = self._group(level).attrs
        inputs: Any = attributes["key_inputs"]
        if key_of(inputs) != attributes["key"]:
            raise HdovdError(f"{self.path}: the key of level {level} does not follow from its key_inputs; the metadata was edited")
        return dict(inputs)

    def identity(self) -> dict[str, Any]:
        """Keys and inputs of all levels, for a run's record."""
        return {"path": str(self.path.resolve()),
                "levels": {str(level): {"key": self.key(level), "inputs": self.key_inputs(level)} for level in self.levels()}}

    def require(self, level: Level, expected: KeyInputs) -> None:
        """Refuse a level whose inputs differ from `expected` (a part of its inputs). Raises HdovdError."""
        found = self.key_inputs(level)
        lines = differences(expected, {name: found.get(name) for name in expected})
        if lines:
            raise HdovdError(f"the {level} level of {self.path} does not fit this data:\n  " + "\n  ".join(lines)
                             + "\nExtract it again with hdovd extract-clip, or give the data it was made from.")

    def require_one_clip(self) -> None:
        """Refuse a cache whose levels were made by different CLIPs. Raises HdovdError."""
        levels = self.levels()
        for level in levels[1:]:
            lines = differences(self.key_inputs(levels[0])["clip"], self.key_inputs(level)["clip"], "clip.")
            if lines:
                raise HdovdError(f"{self.path}: levels {levels[0]} and {level} were made by different CLIPs, so their "
                                 "embeddings cannot be compared:\n  " + "\n  ".join(lines))

    def names(self, level: Level) -> list[str]:
        """Class or noun names, in row order."""
        names: Any = self._group(level).attrs["names"]
        return [str(n) for n in names]

    def embeddings(self, level: Level) -> np.ndarray:
        """(n, D) float32 rows of the class, noun or image level, held in memory as float16."""
        return self._table(f"{level}/embedding").astype(np.float32)

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that was not extracted."""
        have = {name: row for row, name in enumerate(self.names(Level.CLASS))}
        missing = [n for n in names if n not in have]
        if missing:
            raise HdovdError(f"{self.path} has no text embedding of {missing[:8]}: extract it with the same --protocol")
        return self.embeddings(Level.CLASS)[[have[n] for n in names]]

    @property
    def dim(self) -> int:
        """D, the size of every embedding."""
        return int(self._array(f"{Level.CLASS}/embedding").shape[1])

    def failed(self) -> dict[int, str]:
        """Images that lack embeddings at the image or the instance level, with the reason."""
        return {image: reason for level in (Level.IMAGE, Level.INSTANCE) if level in self.levels()
                for image, reason in self.failed_at(level).items()}

    def failed_at(self, level: Level) -> dict[int, str]:
        """Images that have no rows at the image or the instance level, with the reason."""
        failed: Any = self._group(level).attrs["failed"]
        return {int(k): str(v) for k, v in failed.items()}

    def image_embedding(self, image_id: int) -> np.ndarray:
        """(D,) float32."""
        return np.asarray(self._table(f"{Level.IMAGE}/embedding")[self._row(Level.IMAGE, image_id)], np.float32)

    def instances(self, image_id: int) -> InstanceRows:
        """The instance rows of one image."""
        row, offset = self._row(Level.INSTANCE, image_id), self._table(f"{Level.INSTANCE}/offset")
        rows = slice(int(offset[row]), int(offset[row + 1]))
        name = f"{Level.INSTANCE}/embedding"
        array = self._array(name)
        source = self._table(name) if array.nbytes <= HELD_IN_MEMORY_BYTES else array
        embedding = np.asarray(source[rows], np.float32)
        return InstanceRows(embedding, *(self._table(f"{Level.INSTANCE}/{name}")[rows] for name in INSTANCE_COLUMNS))

    def hold(self, level: Level) -> None:
        """Read the tables of the image or instance level now, so that worker processes forked later share them."""
        names = ("embedding",) if level is Level.IMAGE else ("offset", *INSTANCE_COLUMNS)
        for name in names:
            self._table(f"{level}/{name}")
        if level is Level.INSTANCE and self._array(f"{level}/embedding").nbytes <= HELD_IN_MEMORY_BYTES:
            self._table(f"{level}/embedding")
        self._row_table(level)

    def _row(self, level: Level, image_id: int) -> int:
        ids, rows = self._row_table(level)
        at = int(np.searchsorted(ids, image_id))
        if at == len(ids) or ids[at] != image_id:
            raise HdovdError(f"{self.path}: level {level} has no rows of image {image_id}")
        return int(rows[at])

    def _row_table(self, level: Level) -> np.ndarray:
        """(2, N): image ids in order, and their rows."""
        name = f"{level}/row_of"
        if name not in self._tables:
            ids = self._table(f"{level}/image_id")
            self._tables[name] = np.stack([ids[order := np.argsort(ids)], order])
        return self._tables[name]

    def _group(self, level: Level) -> zarr.Group:
        if level not in self._root:
            raise HdovdError(f"{self.path} has no {level} level; it has {', '.join(self.levels()) or 'none'}")
        group = self._root[level]
        assert isinstance(group, zarr.Group)
        return group

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            array = self._group(Level(name.split("/")[0]))[name.split("/")[1]]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]

    def _table(self, name: str) -> np.ndarray:
        if name not in self._tables:
            self._tables[name] = np.asarray(self._array(name)[:])
        return self._tables[name]
