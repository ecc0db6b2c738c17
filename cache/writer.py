"""Writing products: begun by any process, filled part by part by any number of them, the same bytes whoever does it.

A part is encoded in memory by Zarr itself, written object by object (see `Folder.write`), and its record last:
a process that is killed loses the parts that it had not recorded, and nothing else.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr

from hdovd.cache.identity import KeyInputs, key_of
from hdovd.cache.product import Product, record_of
from hdovd.cache.schema import (
    CHUNK_ROWS,
    NORM_TOLERANCE,
    PART_ROWS,
    SCHEMA_VERSION,
    TABLE_ARRAYS,
    TABLES,
    Level,
    row_arrays,
)
from hdovd.cache.store import Folder
from hdovd.core import HdovdError

# What other Zarr readers make of an object that is missing: values that nothing has, so that no shard is left out as
# empty.
UNWRITTEN = {
    "float16": math.nan,
    "float32": math.nan,
    "int32": -(2**31),
    "int64": -(2**63),
    "uint64": 2**64 - 1,
    "uint8": 255,
}


class ProductWriter:
    """Fills one product."""

    def __init__(self, product: Product) -> None:
        self.product = product

    @classmethod
    def begin(
        cls,
        folder: Folder,
        level: Level,
        inputs: KeyInputs,
        *,
        rows: int,
        part_rows: int,
        dim: int = 0,
        tables: dict[str, np.ndarray] | None = None,
        names: Sequence[str] | None = None,
        made_with: dict[str, Any] | None = None,
    ) -> "ProductWriter":
        """Begin a product, or go on with the one of that key: its own metadata then decide on `part_rows` and
        `made_with`.

        Args:
            rows: of every row array; a part holds `part_rows` of them: at most CHUNK_ROWS, or a multiple of it.
            dim: D, for levels with embeddings; of pseudo labels k, if a label is made of k > 1 nouns.
            tables: all of the level's tables (`schema.TABLE_ARRAYS`).
            names: for the class and noun levels.
            made_with: what a reader may want to know and the key does not depend on.
        """
        tables = tables or {}
        if tables.keys() != TABLE_ARRAYS[level].keys():
            raise ValueError(f"tables {sorted(tables)}, expected {sorted(TABLE_ARRAYS[level])}")
        if part_rows < 1 or (part_rows > CHUNK_ROWS and part_rows % CHUNK_ROWS):
            raise HdovdError(f"{part_rows} rows a part: expected at most {CHUNK_ROWS}, or a multiple of it")
        key = key_of(inputs)
        attributes = {
            "schema_version": SCHEMA_VERSION,
            "level": str(level),
            "key": key,
            "key_inputs": inputs,
            "rows": rows,
            "part_rows": part_rows,
            "dim": dim,
            "made_with": made_with or {},
            **({} if names is None else {"names": list(names)}),
        }
        objects: dict[str, Any] = {}
        zarr.create_group(zarr.storage.MemoryStore(objects), attributes=attributes)
        metadata, prefix = objects["zarr.json"].to_bytes(), f"{level}/{key}"
        # Records whose metadata are lost, and were others (rows a part, perhaps), count for nothing. Looked for in this
        # order: another process that has just begun wrote its metadata before its records.
        lost = folder.sizes(f"{prefix}/parts") and not folder.exists(f"{prefix}/zarr.json")
        if lost and not _is_recorded(folder, prefix, metadata):
            folder.delete(f"{prefix}/parts")
        folder.write(f"{prefix}/zarr.json", metadata, exclusive=True)
        writer = cls(Product(folder, level, key))
        if not writer.product.is_finished(TABLES):
            writer._write_tables(tables)
        return writer

    def write_part(self, part: int, arrays: dict[str, np.ndarray], failed: dict[int, str] | None = None) -> None:
        """Write one part: every row array of the level, as many rows as the part has.

        Embeddings are L2-normalised rows, or zeros for images in `failed`. Raises HdovdError if they are not.
        """
        product, failed = self.product, failed or {}
        start, stop = product.rows_of(part)
        group, objects = self._empty()
        for name, (_, wide) in row_arrays(product.level, product.dim).items():
            expected = (stop - start, product.dim) if wide else (stop - start,)
            if arrays[name].shape != expected:
                raise HdovdError(f"{product}, part {part}: {name} has shape {arrays[name].shape}, expected {expected}")
            if name == "embedding":
                self._check_norms(part, arrays[name], zeros=bool(failed))
            group[name][start:stop] = arrays[name]
        self.store(part, {name: objects[name].to_bytes() for name in product.row_objects(part).values()}, failed)

    def _check_norms(self, part: int, rows: np.ndarray, *, zeros: bool) -> None:
        norms = np.linalg.norm(rows.astype(np.float32, copy=False), axis=1)
        wrong = np.flatnonzero(~(np.isclose(norms, 1, atol=NORM_TOLERANCE) | ((norms == 0) & zeros)))
        if len(wrong):
            row = self.product.rows_of(part)[0] + int(wrong[0])
            what = f"{self.product.names[row]!r}" if self.product.names else f"row {row}"
            raise HdovdError(
                f"{self.product}: the embedding of {what} has norm {norms[wrong[0]]:.4g}, expected 1: the model gave "
                f"NaN or an overflow; try --precision fp32 ({len(wrong)} rows)"
            )

    def _write_tables(self, tables: dict[str, np.ndarray]) -> None:
        """The metadata of all arrays, and the tables."""
        group, objects = self._empty()
        for name, values in tables.items():
            _array(group, name, values.shape, TABLE_ARRAYS[self.product.level][name], PART_ROWS)
            if values.size:
                group[name][:] = values
        encoded = {name: data.to_bytes() for name, data in objects.items()}
        self.store(TABLES, encoded | {"zarr.json": self.product.folder.read(f"{self.product.prefix}/zarr.json")}, {})

    def _empty(self) -> tuple[Any, dict[str, Any]]:
        """The product's group in memory, its row arrays still empty, and the objects that it consists of."""
        product, objects = self.product, dict[str, Any]()
        group = zarr.create_group(zarr.storage.MemoryStore(objects))
        for name, (dtype, wide) in row_arrays(product.level, product.dim).items():
            _array(group, name, (product.rows, *([product.dim] if wide else [])), dtype, product.part_rows)
        del objects["zarr.json"]  # of the group: stored when it was begun
        return group, objects

    def store(self, part: int | str, objects: dict[str, bytes], failed: dict[int, str], **more: KeyInputs) -> None:
        """Write a part's objects, and its record last, with `more` in it."""
        product, failures = self.product, {str(image): reason for image, reason in failed.items()}
        record: dict[str, Any] = {"objects": {}, "failed": failures, **more}
        for name, data in sorted(objects.items()):
            product.folder.write(f"{product.prefix}/{name}", data)
            record["objects"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        product.folder.write(product.record_name(part), json.dumps(record, indent=1).encode())


class PartFiller:
    """Takes the rows of a product in order and writes each part when it is full, unless it is there."""

    def __init__(self, writer: ProductWriter, failed: dict[int, dict[int, str]] | None = None) -> None:
        """`failed`: of each part, where that is known; else what `add` is told."""
        self._writer, self._known, self._part, self._rows = writer, failed, 0, 0
        self._pieces, self._failed = list[dict[str, np.ndarray]](), dict[int, str]()

    def add(self, arrays: dict[str, np.ndarray], failed: dict[int, str] | None = None) -> list[int]:
        """(n, ...) more rows of every row array; `failed`: the image that they are of, if it could not be read. Returns
        the parts that were written.
        """
        product, written = self._writer.product, list[int]()
        self._failed |= failed or {}
        self._pieces.append(arrays)
        self._rows += len(next(iter(arrays.values())))
        while self._part < product.parts and self._rows >= (wanted := int(np.diff(product.rows_of(self._part))[0])):
            whole = {name: np.concatenate([piece[name] for piece in self._pieces]) for name in arrays}
            if not product.is_finished(self._part):
                known = self._failed if self._known is None else self._known[self._part]
                self._writer.write_part(self._part, {name: rows[:wanted] for name, rows in whole.items()}, known)
                written.append(self._part)
            self._pieces = [{name: rows[wanted:] for name, rows in whole.items()}]
            self._rows, self._part = self._rows - wanted, self._part + 1
            self._failed = failed or {} if self._rows else {}  # an image that reaches into the next part
        return written


def _is_recorded(folder: Folder, prefix: str, metadata: bytes) -> bool:
    """Whether a product's tables were written beside these very metadata."""
    try:
        entry = json.loads(folder.read(f"{prefix}/{record_of(TABLES)}"))["objects"]["zarr.json"]
        return bool(entry["sha256"] == hashlib.sha256(metadata).hexdigest())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: str, part_rows: int) -> None:
    """An uncompressed array (zstd saves 8% of normalised float16 and halves most reads), a part a shard."""
    rows = max(1, shape[0])
    chunk = min(CHUNK_ROWS, part_rows, rows)
    shard = part_rows if rows >= part_rows else -(-rows // chunk) * chunk
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        compressors=None,
        fill_value=UNWRITTEN[dtype],
        config={"write_empty_chunks": True},
    )
