"""Checking a cache against itself: every checksum, every table, every row. Needs no data, no CLIP and no detector.

`hdovd.pipelines.cache_tools.verify` adds what needs them. Memory is flat: objects are hashed in blocks and rows read in
blocks, part after part.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hdovd.cache.catalog import NAMED, FeatureSet, group_objects, read_run, read_set
from hdovd.cache.identity import SEAL, differences, hash_tables, key_of, require_seal, table_inputs
from hdovd.cache.picture_files import LATER, known_files
from hdovd.cache.product import Product, parse_record, record_of, recorded_parts
from hdovd.cache.reader import FeatureCache
from hdovd.cache.rows import Rows
from hdovd.cache.schema import (
    CHUNK_ROWS,
    INDEX,
    SCHEMA_VERSION,
    STORED_NORM_TOLERANCE,
    TABLE_ARRAYS,
    TABLES,
    Level,
    row_arrays,
)
from hdovd.cache.store import Folder
from hdovd.core import HdovdError, shorten

COSINE_TOLERANCE = 0.01
MOST_MISSING = 100  # parts of a product that are named
RECORDS = {  # by kind, what is expected, and what to do
    "groups": (f"the metadata of a cache of schema {SCHEMA_VERSION}", ""),
    "sets": ("a set of features", ""),
    NAMED: ("the name of a set", ""),
    "runs": ("the record of a run", ": delete it (gc then does not know of that run)"),
}
Check = tuple[str, np.ndarray, str, np.ndarray]  # an array, where (n,) bool it is wrong, what is expected, its values


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    `place`: the object, by its name in the cache. `part`: what of the product has to be made again, a part's number or
    `schema.TABLES`; None if the object just does not belong there. `where`: rows and images, in words.
    """

    place: str
    expected: str
    found: str
    product: tuple[Level, str] | None = None
    part: int | str | None = None
    where: str = ""

    def __str__(self) -> str:
        named = self.place
        if self.product is not None:
            level, key = self.product
            part = "" if self.part is None else ", tables" if self.part == TABLES else f", part {self.part}"
            named = f"{level} {key[:12]}{part}, {self.place.removeprefix(f'{level}/{key}/')}"
        return f"{named}{f', {self.where}' if self.where else ''}: expected {self.expected}, found {self.found}"


@dataclass(slots=True)
class Checked:
    """What is wrong, and how much was looked at. `unfinished`: products of which parts are still missing, which is no
    fault: "level key: parts". `sampled`: cosines of rows that were encoded again with those of the cache, by product.
    """

    findings: list[Finding] = field(default_factory=list)
    products: int = 0
    parts: int = 0
    bytes: int = 0
    unfinished: list[str] = field(default_factory=list)
    sampled: dict[tuple[Level, str], np.ndarray] = field(default_factory=dict)


def product_names(folder: Folder) -> list[tuple[Level, str]]:
    """Every product of a cache, damaged ones too: whatever has a folder LEVEL/KEY with something in it."""
    found = {level: {name.split("/")[1] for name in folder.sizes(level) if name.count("/") > 1} for level in Level}
    return [(level, key) for level, keys in found.items() for key in sorted(keys)]


def unsealed_records(folder: Folder) -> list[str]:
    """Sets and runs of older versions, which have no checksum: what they say cannot be checked."""
    found = []
    for name in (*folder.sizes("sets"), *folder.sizes("runs")):
        with suppress(ValueError, TypeError, AttributeError):  # a finding
            tree = json.loads(folder.read(name))
            require_seal(tree)
            found += [name] * (SEAL not in tree)
    return found


def check_records(folder: Folder) -> tuple[dict[str, FeatureSet], list[Finding]]:
    """The sets that can be read, and what is wrong with the metadata of the root and of the levels, with sets and runs,
    or stands where nothing belongs.
    """
    sets, findings, listed, groups = dict[str, FeatureSet](), list[Finding](), folder.sizes(""), group_objects()
    for name in {**groups, **listed}:
        top, _, rest = name.partition("/")
        kind = top if re.fullmatch(rf"(sets|runs)/[^/]+\.json|{NAMED}/[^/]+", name) else ""
        kind = "groups" if name in groups else kind
        try:
            if kind == "groups":
                if not json.loads(groups[name]).items() <= json.loads(folder.read(name)).items():
                    raise ValueError("it is another one")
            elif kind == "sets":
                sets[rest.removesuffix(".json")] = read_set(folder, name)
            elif kind == "runs":
                read_run(folder.url, name, folder.read(name))
            elif kind == NAMED and folder.read(name) != rest.encode():
                findings.append(Finding(name, rest, "something else: delete it"))
            elif not kind and not (top in set(Level) and "/" in rest):
                findings.append(Finding(name, "nothing there", "an object that is not the cache's: move it elsewhere"))
        except (HdovdError, FileNotFoundError, ValueError, AttributeError) as error:
            if kind == "groups" and isinstance(error, HdovdError):  # not to be read now: it may be sound
                raise
            expected, advice = RECORDS[kind]
            findings.append(Finding(name, expected, _damage(error) + advice))
        if kind == NAMED and f"sets/{rest}.json" not in listed:
            findings.append(
                Finding(
                    f"sets/{rest}.json",
                    "a set of features",
                    f"no such object: it was not dropped by gc --drop-set (if it was meant to go, delete {name})",
                )
            )
    return sets, findings


def check_set(folder: Folder, name: str, features: FeatureSet) -> list[Finding]:
    """Whether a set's products are there and belong together; call it when they are whole and sound."""
    place = f"sets/{name}.json"
    try:
        cache = FeatureCache(folder.url, name)
        cache.require_together()
        if Level.PSEUDO_LABEL in features.levels:
            wanted = hash_tables([cache.product(Level.BOXES).table("source")])
            if cache.key_inputs(Level.PSEUDO_LABEL).get("sources", wanted) != wanted:  # imports do not say it
                return [Finding(place, f"pseudo labels of boxes whose sources have the hash {wanted}", "others")]
    except (HdovdError, KeyError) as error:
        return [Finding(place, "levels that belong together", " ".join(str(error).split()))]
    return []


def check_attributes(product: Product) -> list[Finding]:
    """Whether a product's attributes say what its place and its key inputs say."""
    attributes, inputs = product.attributes, product.attributes["key_inputs"]
    if key_of(inputs) != product.key:
        return [Finding("zarr.json", f"key inputs that give the key {product.key}", key_of(inputs))]
    wanted: dict[str, Any] = {"level": str(product.level), "key": product.key}
    if isinstance(inputs.get("names"), list):
        wanted["names"] = inputs["names"]
    return [
        Finding("zarr.json", f"{name} {str(value)[:60]}", f"{str(attributes.get(name))[:60]}")
        for name, value in wanted.items()
        if attributes.get(name) != value
    ]


def check_tables(product: Product) -> list[Finding]:
    """The arrays of a product, by dtype and shape, and its tables against its key inputs. Raises what Zarr raises for
    what it cannot read.
    """
    tables = {name: product.table(name) for name in TABLE_ARRAYS[product.level]}
    if wrong := [*_check_shapes(product, tables)]:
        return wrong
    found = table_inputs(product.level, tables)
    wanted = {name: product.key_inputs[name] for name in found}
    return [
        Finding(record_of(TABLES), "tables that give the key inputs", line)
        for line in differences(wanted, found, sides=("the key inputs say", "the tables give"))
    ]


def _check_shapes(product: Product, tables: Mapping[str, np.ndarray]) -> Iterator[Finding]:
    rows, images = product.rows, len(tables.get("image_id", ()))
    shapes = {
        "image_id": (rows if product.level is Level.IMAGE else images,),
        "image_hash": (images,),
        "image_size": (images, 2),
        "offset": (images + 1,),
        "box": (rows, 4),
    }
    wanted = {
        **{name: (dtype, shapes.get(name, (rows,))) for name, dtype in TABLE_ARRAYS[product.level].items()},
        **{
            name: (dtype, (rows, product.dim) if wide else (rows,))
            for name, (dtype, wide) in row_arrays(product.level, product.dim).items()
        },
    }
    for name, expected in wanted.items():
        array = tables[name] if name in tables else product.array(name)
        if (str(array.dtype), array.shape) != expected:
            yield Finding(f"{name}/zarr.json", "{} {}".format(*expected), f"{array.dtype} {array.shape}")


def check_rows(product: Product, part: int, failed: set[int]) -> Iterator[Finding]:
    """The rows of one part; `failed`: the images that it says could not be read."""
    known = product.table("image_id") if failed and "image_id" in TABLE_ARRAYS[product.level] else ()
    if strangers := failed.difference(known):
        yield Finding(record_of(part), "failed images that the product has", f"image {shorten([*sorted(strangers)])}")
    checks = (
        _label_checks(product, part) if product.level is Level.PSEUDO_LABEL else _norm_checks(product, part, failed)
    )
    for array, wrong, expected, values in checks:
        if len(rows := np.flatnonzero(wrong)):
            where = name_rows(product, rows + product.rows_of(part)[0])
            yield Finding(product.row_objects(part)[array], expected, str(np.round(values[rows[0]], 4)), where=where)


def _norm_checks(product: Product, part: int, failed: set[int]) -> list[Check]:
    start, stop = product.rows_of(part)
    rows = Rows(product, "embedding", parts={part})
    blocks = (rows.read(first, min(first + CHUNK_ROWS, stop)) for first in range(start, stop, CHUNK_ROWS))
    norms = np.concatenate([np.linalg.norm(block.astype(np.float32), axis=1) for block in blocks])
    zero: np.ndarray = norms == 0
    unit = zero | (abs(norms - 1) <= STORED_NORM_TOLERANCE)
    if failed and zero.any():
        zero = np.logical_and(zero, np.isin(_images_of(product, np.arange(start, stop)), list(failed), invert=True))
    return [
        ("embedding", ~unit, "finite rows of norm 1", norms),
        ("embedding", zero, "zeros only for images that could not be read", norms),
    ]


def _label_checks(product: Product, part: int) -> list[Check]:
    read = {name: Rows(product, name, parts={part}).read(*product.rows_of(part)) for name in product.row_objects(part)}
    noun, cosine = read["noun"], read["noun_cosine"]
    key = str(product.key_inputs["noun"])
    is_there = product.folder.exists(f"{Level.NOUN}/{key}/zarr.json")  # else that is what is found
    most = Product(product.folder, Level.NOUN, key).rows if is_there else np.inf
    no_cosine = ~(abs(cosine) <= 1 + COSINE_TOLERANCE) | ((noun == -1) & (cosine != 0))
    checks: list[Check] = [
        ("noun", (noun < -1) | (noun >= most), f"-1 to {most - 1}" if is_there else "nouns, or -1", noun),
        ("noun_cosine", no_cosine, "cosines, and 0 where there is no noun", cosine),
    ]
    if product.dim:  # of several nouns
        top, weight = read["top_noun"], read["top_weight"]
        bad = ((top < -1) | (top >= most)).any(axis=1) | (top[:, 0] != noun)
        adds_up = abs(weight.sum(axis=1) - np.where(noun == -1, 0, 1)) <= COSINE_TOLERANCE
        sound = adds_up & ((weight >= 0) & ((top >= 0) | (weight == 0))).all(axis=1)
        checks += [
            ("top_noun", bad, "nouns, the label's own first", top),
            ("top_weight", ~sound, "weights that add up to 1, and 0 where there is no noun", weight),
        ]
    return checks


def name_rows(product: Product, rows: np.ndarray) -> str:
    """Rows of a product, and the names or images that they are of, in words."""
    said = f"row{'s' if len(rows) > 1 else ''} {shorten(rows.tolist())}"
    if product.names:
        return f"{said} ({shorten([product.names[row] for row in rows])})"
    if product.level is Level.PSEUDO_LABEL:
        return said
    return f"{said} (image {shorten([*dict.fromkeys(_images_of(product, rows).tolist())])})"


def _images_of(product: Product, rows: np.ndarray) -> np.ndarray:
    """(n,) ids of the images that rows (n,) are of."""
    place = rows if product.level is Level.IMAGE else np.searchsorted(product.table("offset"), rows, "right") - 1
    return product.table("image_id")[place]


class ProductCheck:
    """Checks one product and adds up how much that was."""

    def __init__(
        self, folder: Folder, name: tuple[Level, str], needed_by: str, checked: Checked, on_bytes: Callable[[int], None]
    ) -> None:
        """`needed_by`: the set that needs it whole, or "" if parts may be missing."""
        self.folder, self.name, self.needed_by = folder, name, needed_by
        self.checked, self.on_bytes = checked, on_bytes
        self.prefix = f"{name[0]}/{name[1]}"
        self.findings: list[Finding] = []
        self.product: Product | None = None  # as long as nothing is wrong with its metadata and tables

    def run(self) -> list[Finding]:
        self.checked.products += 1
        with self._adding("zarr.json", "the product's metadata", TABLES):
            self.product = Product(self.folder, *self.name)
            self._add(check_attributes(self.product), TABLES)
        records = self._read_records()
        listed = self.folder.sizes(self.prefix)  # after the records: what these name was there before
        for part, record in records.items():
            if not self._check_objects(part, record, listed) or self.product is None:
                continue
            with self._adding(record_of(part), "values that can be read", part):  # whatever Zarr and numpy raise
                if part == TABLES:
                    self._add(check_tables(self.product), part)
                elif isinstance(part, int):
                    self._add(check_rows(self.product, part, {int(image) for image in record["failed"]}), part)
                    self.checked.parts += 1
        if self.product is not None:
            with self._adding("pictures", "what the files of the pictures were", None):
                known_files(self.product)  # may be deleted: the cache then knows less
            if TABLES in records:
                self._check_extra(self.product, {*records[TABLES]["objects"]}, listed)
            self._check_missing(self.product, {*records})
        return self.findings

    def _add(self, found: Iterable[Finding], part: int | str | None) -> None:
        """Findings, whose places are those in the product, of a part."""
        for one in found:
            self.findings.append(replace(one, place=f"{self.prefix}/{one.place}", product=self.name, part=part))
            if part == TABLES:
                self.product = None

    @contextmanager
    def _adding(self, place: str, expected: str, part: int | str | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._add([Finding(place, expected, _damage(error))], part)

    def _read_records(self) -> dict[int | str, dict[str, Any]]:
        """The records that can be read: of the tables first, then in order."""
        records, recorded = dict[int | str, dict[str, Any]](), recorded_parts(self.folder, self.prefix)
        for part, name in sorted(recorded.items(), key=lambda item: (item[0] != TABLES, item[1])):
            if isinstance(part, str) or self.product is None or part < self.product.parts:
                with self._adding(record_of(part), "the record of a part", part):
                    records[part] = parse_record(self.folder.read(name))
        return records

    def _check_objects(self, part: int | str, record: dict[str, Any], listed: dict[str, int]) -> bool:
        """The objects of a part, by name, size and sha256. True if all are as recorded."""
        before, names = len(self.findings), {*record["objects"]}
        if self.product is not None and (wrong := _objects_of(self.product, part, names) ^ names):
            found = f"wrong or missing: {', '.join(sorted(wrong))}"
            self._add([Finding(record_of(part), "a record of the part's objects and of no others", found)], part)
            return False
        damaged = {finding.place for finding in self.findings}  # metadata that cannot be read
        for name, entry in record["objects"].items():
            path = f"{self.prefix}/{name}"
            if path in damaged:
                continue
            size = listed.get(path, 0)
            self.checked.bytes += size
            if size != entry["bytes"] or path not in listed:
                self._add([Finding(name, f"{entry['bytes']} bytes", str(listed.get(path, "no such object")))], part)
            elif (sha256 := self.folder.sha256(path)) != entry["sha256"]:
                self._add([Finding(name, f"sha256 {entry['sha256'][:16]}...", f"{sha256[:16]}...")], part)
            self.on_bytes(size)
        return len(self.findings) == before

    def _check_missing(self, product: Product, recorded: set[int | str]) -> None:
        seen = recorded | {finding.part for finding in self.findings}
        missing = [part for part in (TABLES, *range(product.parts)) if part not in seen]
        if missing and not self.needed_by:
            done = sum(isinstance(part, int) for part in recorded)
            self.checked.unfinished.append(f"{product.level} {product.key[:12]}: {done}/{product.parts} parts")
        expected = f"the record of a part that {self.needed_by} needs"
        for part in missing[:MOST_MISSING] if self.needed_by else ():
            self._add([Finding(record_of(part), expected, "no such object")], part)

    def _check_extra(self, product: Product, known: set[str], listed: dict[str, int]) -> None:
        """Objects that no record names, and that no part that is still to come or to be made again can have written.
        `known`: those of the tables.
        """
        known |= {f"pictures/{LATER}.npz", record_of(TABLES)}
        for part in range(product.parts):
            known |= {record_of(part), f"pictures/{part:06d}.npz", *product.row_objects(part).values()}
        index = (INDEX, f"parts/{INDEX}")  # one may be built now, or was when it was killed
        names = {path.removeprefix(f"{self.prefix}/") for path in listed} - known
        extra = [name for name in sorted(names) if not name.startswith(index)]
        self._add([Finding(name, "nothing there", "an object that no record names") for name in extra], None)


def _objects_of(product: Product, part: int | str, names: set[str]) -> set[str]:
    """The objects that a part consists of; of tables, whose metadata say in how many objects they are, those of `names`
    that are theirs.
    """
    if isinstance(part, int):
        return {*product.row_objects(part).values()}
    if part != TABLES:
        return {part}
    tables = TABLE_ARRAYS[product.level]
    return {
        "zarr.json",
        *(f"{name}/zarr.json" for name in (*row_arrays(product.level, product.dim), *tables)),
        *(name for name in names if name.split("/")[0] in tables),
    }


def _damage(error: BaseException) -> str:
    """What a reader stumbled over, in one line."""
    if isinstance(error, FileNotFoundError) or (isinstance(error, HdovdError) and error.__cause__ is None):
        return "no such object"
    cause = error.__cause__ or error
    return f"damage ({type(cause).__name__}: {' '.join(str(cause).split())[:100]})"
