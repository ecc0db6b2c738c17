"""Checking a cache against itself: every checksum, every table, every row. Needs no data, no CLIP and no detector.

`hdovd.pipelines.cache_tools.verify` adds what needs them. Memory is flat: objects are hashed in blocks and rows read in
blocks, part after part.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from hdovd.cache.catalog import NAMED, FeatureSet, group_objects, read_run, read_set
from hdovd.cache.content import Wrong, check_attributes, check_rows, check_tables
from hdovd.cache.identity import SEAL, hash_tables
from hdovd.cache.picture_files import LATER, known_files
from hdovd.cache.product import Product, parse_record, record_name
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import ROW_ARRAYS, SCHEMA_VERSION, TABLE_ARRAYS, TABLES, Level, row_arrays
from hdovd.cache.store import Folder
from hdovd.core.errors import HdovdError

MOST_MISSING = 100  # parts of a product that are named
Names = list[tuple[Level, str]]  # of products: level and key


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
        if self.product is None:
            named = self.place
        else:
            level, key = self.product
            part = "" if self.part is None else ", tables" if self.part == TABLES else f", part {self.part}"
            named = f"{level} {key[:12]}{part}, {self.place.removeprefix(f'{level}/{key}/')}"
        return f"{named}{f', {self.where}' if self.where else ''}: expected {self.expected}, found {self.found}"


@dataclass(slots=True)
class Checked:
    """How much was looked at. `unfinished`: products of which parts are still missing, which is no fault: "level key:
    parts".
    """

    products: int = 0
    parts: int = 0
    objects: int = 0
    bytes: int = 0
    rows: int = 0
    unfinished: list[str] = field(default_factory=list)


def product_names(folder: Folder) -> Names:
    """Every product of a cache, damaged ones too: whatever has a folder LEVEL/KEY with something in it."""
    levels = {str(level) for level in Level}
    found = {
        tuple(name.split("/")[:2]) for name in folder.sizes("") if name.split("/")[0] in levels and name.count("/") > 1
    }
    return [(Level(level), key) for level, key in sorted(found, key=lambda p: (list(Level).index(Level(p[0])), p[1]))]


def check_groups(folder: Folder) -> list[Finding]:
    """The metadata of the root and of the levels."""
    findings = []
    for name, data in group_objects().items():
        try:
            tree, wanted = json.loads(folder.read(name)), json.loads(data)
            found = (
                ""
                if all(tree[key] == wanted[key] for key in ("zarr_format", "node_type", "attributes"))
                else "another one"
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            found = _damage(error)
        if found:
            findings.append(Finding(name, f"the metadata of a cache of schema {SCHEMA_VERSION}", found))
    return findings


def unsealed_records(folder: Folder) -> list[str]:
    """Sets and runs of older versions, which have no checksum: what they say cannot be checked."""
    found = []
    for name in (name for kind in ("sets", "runs") for name in folder.sizes(kind)):
        with suppress(ValueError):  # a finding
            found += [name] * (SEAL not in json.loads(folder.read(name)))
    return found


def check_records(folder: Folder) -> tuple[dict[str, FeatureSet], list[Finding]]:
    """The sets that can be read, and what is wrong with sets and runs, or stands where nothing belongs."""
    sets, findings, listed, groups = dict[str, FeatureSet](), list[Finding](), folder.sizes(""), group_objects()
    for name in listed:
        top, _, rest = name.partition("/")
        kind = top if re.fullmatch(rf"(sets|runs)/[^/]+\.json|{NAMED}/[^/]+", name) else ""
        try:
            if kind == "sets":
                sets[rest.removesuffix(".json")] = read_set(folder, name)
            elif kind == "runs":
                read_run(folder.url, name, folder.read(name))
            elif kind == NAMED and folder.read(name) != rest.encode():
                findings.append(Finding(name, rest, "something else: delete it"))
            elif not kind and name not in groups and not (top in set(Level) and "/" in rest):
                findings.append(Finding(name, "nothing there", "an object that is not the cache's: move it elsewhere"))
        except HdovdError as error:
            advice = ": delete it (gc then does not know of that run)" if kind == "runs" else ""
            findings.append(
                Finding(name, "the record of a run" if kind == "runs" else "a set of features", _damage(error) + advice)
            )
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
        FeatureCache(folder.url, name).require_together()
        if Level.PSEUDO_LABEL in features.levels:
            boxes, labels = (
                Product(folder, level, features.levels[level]) for level in (Level.BOXES, Level.PSEUDO_LABEL)
            )
            wanted, found = hash_tables([boxes.table("source")]), labels.key_inputs.get("sources")
            if found not in (None, wanted):  # None: imported
                return [Finding(place, f"pseudo labels of boxes whose sources have the hash {wanted}", str(found))]
    except (HdovdError, KeyError) as error:
        return [Finding(place, "levels that belong together", " ".join(str(error).split()))]
    return []


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
        self.product: Product | None = None

    def run(self) -> list[Finding]:
        self.checked.products += 1
        with self._adding("zarr.json", "the product's metadata", TABLES):
            product = Product(self.folder, *self.name)
            self._add_all(check_attributes(product), TABLES)
            self.product = None if self.findings else product
        records = self._read_records()
        listed = self.folder.sizes(self.prefix)  # after the records: what these name was there before
        for part, record in records.items():
            sound = self._check_objects(part, record, listed)
            if self.product is None or self._is_found(TABLES):
                continue
            with self._adding(_record(part), "values that can be read", part):  # whatever Zarr and numpy raise
                if isinstance(part, str):
                    self._add_all(check_tables(self.product), part)
                elif sound:
                    self._add_all(check_rows(self.product, part, {int(image) for image in record["failed"]}), part)
                    self.checked.rows += len(range(*self.product.rows_of(part)))
        if self.product is not None:
            with self._adding(
                "pictures", "what the files of the pictures were", None
            ):  # may be deleted: the cache then knows less
                known_files(self.product)
            self._check_missing(self.product)
            self._check_extra(self.product, records, listed)
        return self.findings

    def _add(self, place: str, expected: str, found: str, part: int | str | None, where: str = "") -> None:
        if not where and isinstance(part, int) and self.product is not None:
            start, stop = self.product.rows_of(part)
            where = f"rows {start} to {stop - 1}" if stop - start > 1 else f"row {start}"
        self.findings.append(Finding(f"{self.prefix}/{place}", expected, found, self.name, part, where))

    def _add_all(self, wrong: Iterable[Wrong], part: int | str) -> None:
        for w in wrong:
            self._add(w.array, w.expected, w.found, part, w.where)

    @contextmanager
    def _adding(self, place: str, expected: str, part: int | str | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._add(place, expected, _damage(error), part)

    def _is_found(self, part: int | str) -> bool:
        return any(finding.part == part for finding in self.findings)

    def _read_records(self) -> dict[int | str, dict[str, Any]]:
        """The records that can be read: of the tables first, then in order."""
        records: dict[int | str, dict[str, Any]] = {}
        for name in sorted(
            self.folder.sizes(f"{self.prefix}/parts"), key=lambda n: (not n.endswith(f"/{TABLES}.json"), n)
        ):
            found = re.fullmatch(rf".*/parts/({TABLES}|\d{{6,}})\.json", name)
            part = TABLES if found is None or found[1] == TABLES else int(found[1])
            if found is not None and (isinstance(part, str) or self.product is None or part < self.product.parts):
                with self._adding(_record(part), "the record of a part", part):
                    records[part] = parse_record(self.folder.read(name))
        return records

    def _check_objects(self, part: int | str, record: dict[str, Any], listed: dict[str, int]) -> bool:
        """Size and sha256 of every object of a part. True if all are as recorded."""
        before = len(self.findings)
        self.checked.parts += isinstance(part, int)
        if not self._names_its_objects(part, record["objects"].keys()):
            return False
        for name, entry in record["objects"].items():
            path = f"{self.prefix}/{name}"
            if any(finding.place == path for finding in self.findings):  # metadata that cannot be read
                continue
            size = listed.get(path)
            self.checked.objects += 1
            if size is None or size != entry["bytes"]:
                self._add(name, f"{entry['bytes']} bytes", "no such object" if size is None else str(size), part)
            else:
                self.checked.bytes += size
                if (sha256 := self.folder.sha256(path)) != entry["sha256"]:
                    self._add(name, f"sha256 {entry['sha256'][:16]}...", f"{sha256[:16]}...", part)
            self.on_bytes(size or 0)
        return len(self.findings) == before

    def _names_its_objects(self, part: int | str, names: Collection[str]) -> bool:
        level = self.name[0]
        if isinstance(part, int):
            wanted = set(self.product.row_objects(part).values()) if self.product is not None else set(names)
            wrong = wanted ^ set(names)
        else:
            rows = ROW_ARRAYS[level] if self.product is None else row_arrays(level, self.product.dim)
            wanted = {"zarr.json", *(f"{name}/zarr.json" for name in (*rows, *TABLE_ARRAYS[level]))}
            wrong = {
                name for name in wanted ^ set(names) if name in wanted or name.split("/")[0] not in TABLE_ARRAYS[level]
            }
        if wrong:
            expected = f"a record of {len(wanted)} objects and of no others"
            self._add(_record(part), expected, f"wrong or missing: {', '.join(sorted(wrong))}", part)
        return not wrong

    def _check_missing(self, product: Product) -> None:
        rows = product.missing()
        missing: list[int | str] = [*([] if product.is_finished(TABLES) else [TABLES]), *rows]
        if missing and not self.needed_by:
            done = product.parts - len(rows)
            self.checked.unfinished.append(f"{product.level} {product.key[:12]}: {done}/{product.parts} parts")
        for part in missing[:MOST_MISSING] if self.needed_by else ():
            if not self._is_found(part):
                self._add(_record(part), f"the record of a part that {self.needed_by} needs", "no such object", part)

    def _check_extra(self, product: Product, records: dict[int | str, dict[str, Any]], listed: dict[str, int]) -> None:
        """Objects that no record names, and that no part that is still to come or to be made again can have written."""
        known = {
            "zarr.json",
            f"pictures/{LATER}.npz",
            _record(TABLES),
            *records.get(TABLES, {"objects": ()})["objects"],
        }
        for part in range(product.parts):
            known |= {_record(part), f"pictures/{part:06d}.npz", *product.row_objects(part).values()}
        of_tables = (
            *(f"{name}/" for name in TABLE_ARRAYS[product.level]),
            *(f"{name}/zarr.json" for name in row_arrays(product.level, product.dim)),
        )
        tables_unknown = TABLES not in records or self._is_found(TABLES)
        for name in (path.removeprefix(f"{self.prefix}/") for path in listed):
            if name not in known and not (tables_unknown and name.startswith(of_tables)):
                self._add(name, "nothing there", "an object that no record names", None)


def _record(part: int | str) -> str:
    """The name of a part's record in its product."""
    return record_name("", part)[1:]


def _damage(error: BaseException) -> str:
    """What a reader stumbled over, in one line."""
    if isinstance(error, FileNotFoundError) or (isinstance(error, HdovdError) and error.__cause__ is None):
        return "no such object"
    cause = error.__cause__ or error
    return f"damage ({type(cause).__name__}: {' '.join(str(cause).split())[:100]})"
