"""One product of a cache: what its own metadata and part files say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from hdovd.cache.identity import KeyInputs, key_of
from hdovd.cache.schema import INDEX, PART_ROWS, ROW_ARRAYS, TABLE_ARRAYS, TABLES, Level, row_arrays
from hdovd.cache.store import REPAIR, Folder, naming_damage
from hdovd.core import HdovdError

if TYPE_CHECKING:
    import numpy as np
    import zarr

MOST_PARTS, MOST_PART_ROWS, MOST_DIM = (
    1_000_000,
    2**24,
    2**16,
)  # far beyond all that is made: what is more was damaged or made up
MOST_PACKED = 1_000  # how many times larger a table may be than what is stored of it


class Product:
    """A product by level and key. What is finished is read from `parts/` at every call: other processes may be writing.

    `names`: of classes or nouns, in row order; else empty. `dim`: D; of pseudo labels the number of nouns that a label
    is made of, if it is more than one; else 0.
    """

    def __init__(self, folder: Folder, level: Level, key: str) -> None:
        """Raises HdovdError if there is none."""
        self.folder, self.level, self.key = folder, level, key
        self.prefix = f"{level}/{key}"
        try:
            with naming_damage(f"{folder.url}/{self.prefix}/zarr.json"):
                self.attributes: dict[str, Any] = json.loads(folder.read(f"{self.prefix}/zarr.json"))["attributes"]
                require_sizes(self.attributes)
        except FileNotFoundError:
            raise HdovdError(f"{folder.url} has no {level} product {key}; hdovd cache ls lists what is there") from None
        self.rows: int = self.attributes["rows"]
        self.part_rows: int = self.attributes["part_rows"]
        self.dim: int = self.attributes["dim"]
        self.names: list[str] = list(self.attributes.get("names") or ())

    def __str__(self) -> str:
        return f"{self.level} {self.key}"

    @property
    def key_inputs(self) -> KeyInputs:
        """What made the product. Raises HdovdError if they were changed since."""
        inputs: KeyInputs = self.attributes["key_inputs"]
        if key_of(inputs) != self.key:
            raise HdovdError(
                f"{self.folder.url}: the key of {self} does not follow from its key_inputs; the metadata was edited"
            )
        return inputs

    @property
    def parts(self) -> int:
        """How many parts a whole product has, its tables not counted."""
        return -(-self.rows // self.part_rows) if ROW_ARRAYS[self.level] else 0

    def rows_of(self, part: int) -> tuple[int, int]:
        """First row and row after the last."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.rows)

    def row_objects(self, part: int) -> dict[str, str]:
        """The object that holds a part of each row array, by array."""
        return {
            name: f"{name}/c/{part}" + ("/0" if wide else "")
            for name, (_, wide) in row_arrays(self.level, self.dim).items()
        }

    def record_name(self, part: int | str) -> str:
        """The object that says that a part is done."""
        return f"{self.prefix}/{record_of(part)}"

    def recorded(self) -> dict[str, int | str]:
        """Finished parts, by number or TABLES, by the object that records them; no index."""
        return {
            name: part
            for part, name in recorded_parts(self.folder, self.prefix).items()
            if isinstance(part, int) or part == TABLES
        }

    def finished(self) -> set[int]:
        """The parts that are done."""
        return {part for part in self.recorded().values() if isinstance(part, int)}

    def is_finished(self, part: int | str) -> bool:
        return self.folder.exists(self.record_name(part))

    def missing(self) -> list[int]:
        return sorted(set(range(self.parts)) - self.finished())

    @property
    def whole(self) -> bool:
        return self.is_finished(TABLES) and not self.missing()

    def records(self) -> dict[int | str, dict[str, Any]]:
        """Of every finished part, its record (see `parse_record`). Raises HdovdError if one is not readable."""
        recorded, records = self.recorded(), {}
        for name, text in zip(recorded, self.folder.read_many([*recorded]), strict=True):
            with naming_damage(f"{self.folder.url}/{name}"):
                records[recorded[name]] = parse_record(text)
        return records

    def require_sound(self, part: int | str, names: Collection[str] | None = None) -> None:
        """Raises HdovdError unless objects of a finished part, all or those of `names`, have the bytes that were
        recorded when they were written.
        """
        name = self.record_name(part)
        try:
            with naming_damage(f"{self.folder.url}/{name}"):
                objects = parse_record(self.folder.read(name))["objects"]
            for name in objects if names is None else names:
                with naming_damage(f"{self.folder.url}/{self.prefix}/{name}"):
                    if self.folder.sha256(f"{self.prefix}/{name}") != objects[name]["sha256"]:
                        raise ValueError("it is not what was written there")
        except FileNotFoundError as error:
            raise HdovdError(f"{self.folder.url}: part {part} of {self} is gone ({error}): {REPAIR}") from error

    def failed(self) -> dict[int, str]:
        """Images that could not be read, with the reason: their rows are zeros."""
        return {int(image): reason for record in self.records().values() for image, reason in record["failed"].items()}

    def failed_parts(self) -> list[int]:
        """The parts that hold such images."""
        return sorted(part for part, record in self.records().items() if record["failed"] and isinstance(part, int))

    def array(self, name: str) -> zarr.Array[Any]:
        """Raises HdovdError if its metadata are not there or not readable."""
        import zarr  # here: catalogs list products by their metadata alone

        from hdovd.cache.zarr_store import FolderStore

        with naming_damage(f"{self.folder.url}/{self.prefix}/{name}/zarr.json"):
            array = zarr.open_array(FolderStore(self.folder, f"{self.prefix}/{name}"), mode="r", zarr_format=3)
            rows, *rest = array.shards or array.chunks
            if (
                not 0 < rows <= max(self.part_rows, PART_ROWS)
                or array.ndim > 2
                or (rest and not 0 < rest[0] <= max(1, array.shape[1]))
            ):
                raise ValueError(f"parts of {(rows, *rest)} values of {array.shape}")
        return array

    def table(self, name: str) -> np.ndarray:
        """A table, or a row array, whole. Raises HdovdError if it is not there, damaged, or not what was written."""
        listed, array = self.folder.sizes(f"{self.prefix}/{name}"), self.array(name)
        with naming_damage(f"{self.folder.url}/{self.prefix}/{name}"):
            if array.nbytes > MOST_PACKED * sum(listed.values()):
                raise ValueError(f"expected {array.shape} values, of which {sum(listed.values())} bytes are there")
        is_table = name in TABLE_ARRAYS[self.level]
        self.require_sound(
            TABLES, [path.removeprefix(f"{self.prefix}/") for path in listed] if is_table else [f"{name}/zarr.json"]
        )
        for part in range(0 if is_table else self.parts):
            self.require_sound(part, [self.row_objects(part)[name]])
        return decoded(array, slice(None))

    def bytes(self) -> int:
        return sum(self.folder.sizes(self.prefix).values())


def record_of(part: int | str) -> str:
    """Where a part, by number, TABLES or the name of an index, is recorded in its product."""
    return f"parts/{part if isinstance(part, str) else f'{part:06d}'}.json"


def recorded_parts(folder: Folder, prefix: str) -> dict[int | str, str]:
    """The objects that record what is done of the product `prefix`, indices too, by part."""
    names = folder.sizes(f"{prefix}/parts")
    found = [re.fullmatch(rf".*/parts/({TABLES}|{INDEX}\w+|\d{{6}})\.json", name) for name in names]
    return {int(one[1]) if one[1].isdecimal() else one[1]: one[0] for one in found if one is not None}


def require_sizes(attributes: dict[str, Any]) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError for attributes that no product has: sizes that are no
    whole numbers, or beyond all reason.
    """
    for name, (least, most) in {
        "rows": (0, MOST_PARTS * MOST_PART_ROWS),
        "part_rows": (1, MOST_PART_ROWS),
        "dim": (0, MOST_DIM),
    }.items():
        value = attributes[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {repr(value)[:40]}, expected a whole number from {least} to {most}")
    names, rows = attributes.get("names"), attributes["rows"]
    if -(-rows // attributes["part_rows"]) > MOST_PARTS:
        raise ValueError(f"{rows} rows in parts of {attributes['part_rows']}, expected {MOST_PARTS} parts at most")
    if names is not None and (len(names) != rows or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"{len(names)} names of {rows} rows")
    attributes["key_inputs"].keys(), attributes["made_with"].keys()


def parse_record(text: bytes) -> dict[str, Any]:
    """The record of a part: `objects`, "bytes" and "sha256" by name, and `failed`, reason by image id. Raises
    ValueError, KeyError, TypeError or AttributeError if it is none.
    """
    record: dict[str, Any] = json.loads(text)
    if not (
        all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in record["objects"].values()
        )
        and all(int(image) is not None and isinstance(reason, str) for image, reason in record["failed"].items())
    ):
        raise ValueError("an object without its size and checksum, or an image without its reason")
    return record


def decoded(array: zarr.Array[Any], rows: slice) -> np.ndarray:
    """Rows of an array, read by Zarr. Raises HdovdError if what is stored cannot be decoded."""
    import numpy as np

    with naming_damage(str(array.store_path)):
        return np.asarray(array[rows])
