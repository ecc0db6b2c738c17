"""What verification finds in a cache by itself: every flipped bit, and values that are wrong under checksums that are
right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import CHUNK_ROWS, TABLE_ARRAYS, TABLES, Catalog, FeatureSet, KeyInputs, Level, hash_tables, key_of
from hdovd.cache.identity import table_inputs
from hdovd.cache.schema import ROW_ARRAYS
from hdovd.cache.store import open_folder
from hdovd.cache.verify import Checked, Finding, ProductCheck, check_records, check_set, product_names
from hdovd.cache.writer import ProductWriter

D, PART_ROWS = 8, 4
NAMES = {Level.CLASS: ["cat", "dog", "fire hydrant"], Level.NOUN: list("abcde")}


def _unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.normal(size=(count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def _tables() -> dict[str, np.ndarray]:
    """Four images, one of them without boxes, with 10 boxes: 2 + 3, 1 + 0, 0, 3 + 1 (base boxes and proposals)."""
    corner = np.arange(10, dtype=np.float32)[:, None] + np.zeros(2, np.float32)
    return {
        "image_id": np.array([40, 7, 19, 23], np.int64),
        "image_hash": np.array([5, 6, 7, 8], np.uint64),
        "image_size": np.array([[100, 80]] * 4, np.int32),
        "offset": np.array([0, 5, 6, 6, 10], np.int64),
        "box": np.concatenate([corner, corner + 20], axis=1),
        "source": np.array([0, 0, 1, 1, 1, 0, 0, 0, 0, 1], np.uint8),
        "score": np.linspace(1, 0.1, 10).astype(np.float32),
        "annotation_id": np.array([1, 2, -1, -1, -1, 3, 4, 5, 6, -1], np.int64),
    }


def write_cache(
    path: Path, *, failed: dict[int, str] | None = None, sources: np.ndarray | None = None, **changes: np.ndarray
) -> Catalog:
    """A whole cache with the set default; `changes` replace tables, under keys of the tables that they replace."""
    rng, right = np.random.default_rng(3), _tables()
    tables = right | changes
    inputs: dict[Level, KeyInputs] = {
        level: {"clip": {"weights": "w"}} | table_inputs(level, {name: right[name] for name in TABLE_ARRAYS[level]})
        for level in Level
    }
    inputs[Level.BOXES].pop("clip")
    for level, names in NAMES.items():
        inputs[level]["names"] = names
    inputs[Level.PSEUDO_LABEL] = {
        "instance": key_of(inputs[Level.INSTANCE]),
        "noun": key_of(inputs[Level.NOUN]),
        "sources": hash_tables([right["source"] if sources is None else sources]),
    }
    rows = {Level.BOXES: 10, Level.INSTANCE: 10, Level.PSEUDO_LABEL: 10, Level.IMAGE: 4, Level.CLASS: 3, Level.NOUN: 5}
    noun = np.array([-1, -1, 3, 0, 4, -1, -1, -1, -1, 2], np.int32)
    catalog = Catalog.create(path)
    for level in Level:
        writer = ProductWriter.begin(
            catalog.folder,
            level,
            inputs[level],
            rows=rows[level],
            part_rows=PART_ROWS,
            names=NAMES.get(level),
            dim=D if "embedding" in ROW_ARRAYS[level] else 0,
            made_with={"batch_size": 2},
            tables={name: tables[name] for name in TABLE_ARRAYS[level]},
        )
        values = {
            "embedding": _unit(rng, rows[level]),
            "noun": noun,
            "noun_cosine": np.where(noun < 0, 0, 0.3).astype(np.float32),
        }
        for part in range(writer.product.parts):
            start, stop = writer.product.rows_of(part)
            arrays = {name: values[name][start:stop].copy() for name in ROW_ARRAYS[level]}
            here = {}
            if level is Level.INSTANCE and part == 1 and failed:
                here, arrays["embedding"][1] = failed, 0  # row 5, the one row of image 7
            writer.write_part(part, arrays, here)
    catalog.write_set("default", FeatureSet({level: key_of(inputs[level]) for level in Level}))
    return catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return write_cache(tmp_path / "cache", failed={7: "gone.jpg: no such file"})


def findings(cache: Path, *, whole: bool = True, checked: Checked | None = None) -> list[Finding]:
    """All that is wrong; `whole`: a set needs every product."""
    folder, checked = open_folder(cache), checked or Checked()
    sets, found = check_records(folder)
    for name in product_names(folder):
        found += ProductCheck(folder, name, "set default" if whole else "", checked, lambda _: None).run()
    return found + [
        finding for name, features in sets.items() if not found for finding in check_set(folder, name, features)
    ]


def _root(catalog: Catalog) -> Path:
    return Path(catalog.folder.url)


def _product(catalog: Catalog, level: Level) -> Path:
    (product,) = catalog.products(level)
    return _root(catalog) / product.prefix


def _rewrite(
    product: Path, name: str, change: Callable[[np.ndarray], None], dtype: str, shape: tuple[int, ...]
) -> None:
    """Change the rows of a part's object and its checksum with them."""
    data = np.fromfile(product / name, np.uint8)
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    change(data[:count].view(dtype).reshape(shape))
    data.tofile(product / name)
    for record in (product / "parts").glob("*.json"):
        tree = json.loads(record.read_text())
        if name in tree["objects"]:
            tree["objects"][name]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
            record.write_text(json.dumps(tree, indent=1))


def test_a_sound_cache(catalog: Catalog, untouched: Callable[[Path], Any]) -> None:
    checked = Checked()
    with untouched(_root(catalog)):
        assert findings(_root(catalog), checked=checked) == []
    sizes = {
        name: size for name, size in catalog.folder.sizes("").items() if name.count("/") > 1 and "/parts/" not in name
    }
    assert (checked.products, checked.parts) == (6, 3 + 3 + 1 + 1 + 2)
    assert checked.bytes == sum(sizes.values())


# --- bytes ---


def test_a_flipped_bit_is_found_in_every_file(catalog: Catalog) -> None:
    """Whatever the file: the finding names it, or the record that names it."""
    root, rng = _root(catalog), np.random.default_rng(0)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    assert len(files) > 60
    for file in files:
        before, name = file.read_bytes(), file.relative_to(root).as_posix()
        for at in {0, len(before) - 1, int(rng.integers(len(before)))}:
            file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            if name.count("/") < 2:
                found = check_records(catalog.folder)[1]
            else:
                level, key = name.split("/")[:2]
                found = ProductCheck(catalog.folder, (Level(level), key), "", Checked(), lambda _: None).run()
            assert found, f"{name}, byte {at}"
            assert any(f.place == name or "/parts/" in name for f in found), (name, at, found)
        file.write_bytes(before)
    assert findings(root) == []


def test_every_byte_of_a_record_counts(catalog: Catalog) -> None:
    product = _product(catalog, Level.IMAGE)
    record = product / "parts/000000.json"
    before = record.read_bytes()
    for at in range(len(before)):
        record.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        found = ProductCheck(catalog.folder, (Level.IMAGE, product.name), "", Checked(), lambda _: None).run()
        assert [f.part for f in found] == [0], at


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "part 1, embedding/c/1/0: expected 84 bytes, found 83"),
        (lambda f: f.write_bytes(b""), "part 1, embedding/c/1/0: expected 84 bytes, found 0"),
        (lambda f: f.unlink(), "part 1, embedding/c/1/0: expected 84 bytes, found no such object"),
        (
            lambda f: (f.parents[2] / "c/7").write_text("x"),
            ", embedding/c/7: expected nothing there, found an object that no record names",
        ),
        (
            lambda f: (f.parents[3] / "parts/000009.json").write_text("{}"),
            ", parts/000009.json: expected nothing there, found an object that",
        ),
        (
            lambda f: (f.parents[3] / "notes.txt").write_text("x"),
            ", notes.txt: expected nothing there, found an object that no record names",
        ),
        (
            lambda f: (f.parents[3] / "parts/000001.json").unlink(),
            "part 1, parts/000001.json: expected the record of a part that set default needs, found no such object",
        ),
    ],
    ids=["truncated", "empty", "deleted", "extra shard", "extra record", "extra file", "no record"],
)
def test_the_line_says_what_and_where(catalog: Catalog, damage: Callable[[Path], object], expected: str) -> None:
    product = _product(catalog, Level.INSTANCE)
    damage(product / "embedding/c/1/0")
    (finding,) = findings(_root(catalog))
    assert str(finding).startswith(f"instance {product.name[:12]}")
    assert expected in str(finding)
    assert "\n" not in str(finding)


def test_damaged_metadata_stop_nothing(catalog: Catalog) -> None:
    """The product is named, its objects are still checked, and so are all others."""
    product = _product(catalog, Level.INSTANCE)
    (product / "zarr.json").write_text("{")
    (product / "embedding/c/2/0").unlink()
    (_product(catalog, Level.NOUN) / "embedding/c/1/0").unlink()
    found = findings(_root(catalog))
    assert [(f.place.split("/", 2)[2], f.part) for f in found] == [
        ("zarr.json", TABLES),
        ("embedding/c/2/0", 2),
        ("embedding/c/1/0", 1),
    ]


# --- values under right checksums ---

BOX = _tables()["box"]


def _changed(values: np.ndarray, at: Any, value: Any) -> np.ndarray:
    values = values.copy()
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("offset", np.array([0, 5, 4, 6, 10], np.int64), "boxes.hash differs"),
        ("offset", np.array([0, 5, 6, 6, 9], np.int64), "boxes.hash differs"),
        ("offset", np.array([1, 5, 6, 6, 10], np.int64), "boxes.hash differs"),
        ("image_id", np.array([40, 7, 19, 40], np.int64), "images.hash differs"),
        ("box", _changed(BOX, (5, 2), np.nan), "base_boxes.hash differs"),
        ("box", _changed(BOX, (slice(6, 8), 2), 0), "boxes.hash differs"),
        ("box", _changed(BOX, (9, 3), 80.5), "proposals.hash differs"),
        ("box", _changed(BOX, ([0, 9], 0), -1), "proposals.hash differs"),
        ("source", _changed(_tables()["source"], 3, 2), "proposals.count differs"),
        ("source", _changed(_tables()["source"], 2, 0), "base_boxes.count differs"),
        ("score", _changed(_tables()["score"], 3, np.inf), "proposals.hash differs"),
        (
            "image_hash",
            np.array([5, 6, 7, 9], np.uint64),
            "expected tables that give the key inputs, found images.hash differs",
        ),
        ("box", BOX[::-1].copy(), "expected tables that give the key inputs, found base_boxes.hash differs"),
        (
            "score",
            _tables()["score"] * np.float32(0.5),
            "expected tables that give the key inputs, found proposals.hash differs",
        ),
        ("image_id", np.array([40, 7, 19], np.int64), "image_hash/zarr.json: expected uint64 (3,), found uint64 (4,)"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.isidentifier() else "",
)
def test_wrong_tables(tmp_path: Path, name: str, values: np.ndarray, expected: str) -> None:
    found = findings(_root(write_cache(tmp_path / "cache", **{name: values})))
    lines = [str(finding) for finding in found]
    assert any(line.startswith("boxes ") and expected in line for line in lines), lines
    assert {finding.part for finding in found} == {TABLES}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows.__setitem__((1, 3), np.nan), "row 5 (image 7): expected finite rows of norm 1, found nan"),
        (lambda rows: rows.__setitem__((slice(2, 4), 0), np.inf), "rows 6, 7 (image 23): expected finite rows"),
        (
            lambda rows: rows.__imul__(np.float16(1.01)),
            "rows 4, 5, 6, 7 (image 40, 7, 23): expected finite rows of norm 1, found 1.0",
        ),
        (
            lambda rows: rows.__setitem__([0, 3], 0),
            "rows 4, 7 (image 40, 23): expected zeros only for images that could not be read",
        ),
    ],
)
def test_wrong_rows(tmp_path: Path, change: Callable[[np.ndarray], None], expected: str) -> None:
    catalog = write_cache(tmp_path / "cache")
    _rewrite(_product(catalog, Level.INSTANCE), "embedding/c/1/0", change, "<f2", (4, D))
    (finding,) = findings(_root(catalog))
    assert expected in str(finding)
    assert finding.part == 1


def test_zeros_are_right_for_images_that_could_not_be_read_alone(catalog: Catalog) -> None:
    assert findings(_root(catalog)) == []  # image 7 has failed
    product = _product(catalog, Level.INSTANCE)
    record = product / "parts/000001.json"
    tree = json.loads(record.read_text())
    record.write_text(json.dumps(tree | {"failed": {}}, indent=1))
    (finding,) = findings(_root(catalog))
    assert "row 5 (image 7): expected zeros only for images that could not be read, found 0.0" in str(finding)
    record.write_text(json.dumps(tree))
    _rewrite(product, "embedding/c/1/0", lambda rows: rows.__setitem__([0, 1, 3], 0), "<f2", (4, D))
    (finding,) = findings(_root(catalog))
    assert "rows 4, 7 (image 40, 23): expected zeros only" in str(finding)  # not row 5
    _rewrite(product, "embedding/c/1/0", lambda rows: rows.__setitem__(([0, 3], 0), 1), "<f2", (4, D))
    assert findings(_root(catalog)) == []
    tree = json.loads(record.read_text())
    record.write_text(json.dumps(tree | {"failed": {"7": "gone", "8": "gone"}}, indent=1))
    (finding,) = findings(_root(catalog))
    assert "expected failed images that the product has, found image 8" in str(finding)


def test_wrong_rows_of_names_are_named(catalog: Catalog) -> None:
    _rewrite(_product(catalog, Level.CLASS), "embedding/c/0/0", lambda rows: rows.__setitem__(2, 0), "<f2", (3, D))
    (finding,) = findings(_root(catalog))
    assert "row 2 (fire hydrant): expected zeros only" in str(finding)


@pytest.mark.parametrize(
    ("array", "dtype", "value", "expected"),
    [
        ("noun", "<i4", 5, "row 2: expected -1 to 4, found 5"),
        ("noun", "<i4", -2, "row 2: expected -1 to 4, found -2"),
        ("noun", "<i4", -1, "row 2: expected cosines, and 0 where there is no noun"),
        ("noun_cosine", "<f4", 1.5, "row 2: expected cosines"),
        ("noun_cosine", "<f4", np.nan, "row 2: expected cosines"),
    ],
)
def test_wrong_pseudo_labels(catalog: Catalog, array: str, dtype: str, value: float, expected: str) -> None:
    _rewrite(
        _product(catalog, Level.PSEUDO_LABEL), f"{array}/c/0", lambda rows: rows.__setitem__(2, value), dtype, (4,)
    )
    (finding,) = findings(_root(catalog))
    assert expected in str(finding)
    assert finding.part == 0


def test_metadata_whose_checksum_was_changed_with_them(catalog: Catalog) -> None:
    for level, before, after, expected in (
        (Level.IMAGE, '"weights": "w"', '"weights": "v"', "expected key inputs that give the key"),
        (Level.CLASS, '"dog"', '"cow"', "expected key inputs that give the key"),
        (Level.NOUN, '"rows": 5', '"rows": 4', "5 names of 4 rows"),
    ):
        file = _product(catalog, level) / "zarr.json"
        text = file.read_text()
        file.write_text(text.replace(before, after))
        found = ProductCheck(catalog.folder, (level, file.parent.name), "", Checked(), lambda _: None).run()
        assert expected in str(found[0])
        assert {f.part for f in found} == {TABLES}
        file.write_text(text)


# --- sets, runs, unfinished products ---


def test_sets_and_runs(catalog: Catalog) -> None:
    root = _root(catalog)
    (root / "runs").mkdir()
    (root / "runs/0123.json").write_text("{")
    (root / "sets/other.json").write_text("[]")
    (root / "sets/notes.txt").write_text("x")
    (root / "README").write_text("x")
    lines = [str(finding) for finding in findings(root)]
    assert [line.split(": ")[0] for line in lines] == ["README", "runs/0123.json", "sets/notes.txt", "sets/other.json"]


def test_sets_of_products_that_do_not_belong_together(tmp_path: Path) -> None:
    catalog = write_cache(tmp_path / "cache", sources=_tables()["source"][::-1])
    (finding,) = findings(_root(catalog))
    assert str(finding).startswith("sets/default.json: expected pseudo labels of boxes whose sources have the hash")
    inputs = {"clip": {"weights": "w"}, "names": ["x"]}
    noun = ProductWriter.begin(catalog.folder, Level.NOUN, inputs, rows=1, part_rows=4, dim=D, names=["x"])
    noun.write_part(0, {"embedding": _unit(np.random.default_rng(0), 1)})
    features = catalog.sets()["default"]
    catalog.write_set("default", FeatureSet(features.levels | {Level.NOUN: noun.product.key}))
    (finding,) = findings(_root(catalog))
    assert "expected levels that belong together" in str(finding)
    assert "pseudo_label and noun" in str(finding)


def test_a_cache_that_is_being_extracted(catalog: Catalog) -> None:
    """A product just begun, one with an object whose record is still to come, a file being written: no findings."""
    product = _product(catalog, Level.INSTANCE)
    for name in ("parts/000000.json", "parts/000002.json", "embedding/c/0/0"):
        (product / name).unlink()
    (product / "parts/.partial-host-1-abc").write_text("{")
    boxes = _product(catalog, Level.BOXES)
    (boxes / "parts/tables.json").unlink()
    (boxes / "score/c/0").unlink()
    catalog.delete_set("default")
    checked = Checked()
    assert findings(_root(catalog), whole=False, checked=checked) == []
    assert checked.unfinished == [f"boxes {boxes.name[:12]}: 0/0 parts", f"instance {product.name[:12]}: 1/3 parts"]
    found = findings(_root(catalog))  # a set that needs them whole
    assert [(f.product and f.product[0], f.part) for f in found] == [
        (Level.BOXES, TABLES),
        (Level.INSTANCE, 0),
        (Level.INSTANCE, 2),
    ]


def test_an_empty_cache(tmp_path: Path) -> None:
    Catalog.create(tmp_path / "cache")
    assert findings(tmp_path / "cache") == []


def test_parts_longer_than_a_chunk(tmp_path: Path) -> None:
    """Rows are read in blocks: the last one counts, too."""
    rows = CHUNK_ROWS * 2 + 7
    names = [f"n{row}" for row in range(rows)]
    embedding = _unit(np.random.default_rng(0), rows)
    writer = ProductWriter.begin(
        Catalog.create(tmp_path / "cache").folder,
        Level.NOUN,
        {"names": names},
        rows=rows,
        part_rows=4 * CHUNK_ROWS,
        dim=D,
        names=names,
    )
    writer.write_part(0, {"embedding": embedding})
    assert findings(tmp_path / "cache") == []
    _rewrite(
        tmp_path / "cache" / writer.product.prefix,
        "embedding/c/0/0",
        lambda r: r.__setitem__(([5, CHUNK_ROWS, rows - 1], 0), np.nan),
        "<f2",
        (rows, D),
    )
    (finding,) = findings(tmp_path / "cache")
    assert finding.where == f"rows 5, 1024, {rows - 1} (n5, n1024, n{rows - 1})"
