"""What a reader checks of a cache and of tar shards, and names and sizes in them that a stranger made up."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import Catalog, FeatureSet, Level, Product, RunRecord
from hdovd.cache.picture_files import FILE, known_files, write_files
from hdovd.cache.reader import FeatureCache
from hdovd.cache.store import LocalFolder
from hdovd.cache.verify import Checked, ProductCheck, check_records, unsealed_records
from hdovd.cache.writer import ProductWriter
from hdovd.core import HdovdError
from hdovd.pipelines.cache_tools.listing import delete_garbage, find_garbage, inventory


@pytest.fixture
def root(write_cache: Callable[..., Any], tmp_path: Path) -> Path:
    write_cache(tmp_path / "cache")
    return tmp_path / "cache"


def product(root: Path, level: Level) -> Path:
    return root / level / FeatureCache(root).key(level)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def reseal(product: Path, name: str) -> None:
    """Have the tables' record say of an object what is there now."""
    record = product / "parts" / "tables.json"
    tree, data = json.loads(record.read_text()), (product / name).read_bytes()
    tree["objects"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record.write_text(json.dumps(tree))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_part_that_is_damaged_is_refused_when_it_is_first_read(root: Path, mapped: bool) -> None:
    flip(product(root, Level.INSTANCE) / "embedding/c/0/0", 3)
    cache, image = FeatureCache(root, mapped=mapped), int(FeatureCache(root).image_ids()[0])
    with pytest.raises(HdovdError, match=r"embedding/c/0/0 is damaged \(it is not what was written"):
        cache.instance_embeddings(image)
    with pytest.raises(HdovdError, match="is damaged"):  # not only once
        cache.instances(image)
    assert len(FeatureCache(root, mapped=mapped, checked=False).instance_embeddings(image))


def test_a_record_that_names_other_objects_lets_nothing_pass(root: Path) -> None:
    folder = product(root, Level.INSTANCE)
    flip(folder / "embedding/c/0/0", 3)
    record = folder / "parts" / "000000.json"
    record.write_text(record.read_text().replace("embedding/c/0/0", "embedding/d/0/0"))
    with pytest.raises(HdovdError, match="is damaged"):
        FeatureCache(root).instance_embeddings(int(FeatureCache(root).image_ids()[0]))


@pytest.mark.parametrize(
    ("level", "name"),
    [
        (Level.BOXES, "box"),
        (Level.BOXES, "source"),
        (Level.CLASS, "embedding"),
        (Level.NOUN, "embedding"),
        (Level.IMAGE, "embedding"),
        (Level.PSEUDO_LABEL, "noun"),
    ],
)
def test_tables_that_are_damaged_are_refused(root: Path, level: Level, name: str) -> None:
    flip(next(file for file in sorted((product(root, level) / name / "c").rglob("*")) if file.is_file()), 1)
    with pytest.raises(HdovdError, match=rf"{name}/c/.* is damaged"):
        Product(LocalFolder(root), level, product(root, level).name).table(name)


def test_a_set_or_a_run_that_was_changed_is_found(root: Path) -> None:
    catalog = Catalog(root)
    catalog.record_run(RunRecord("/runs/a", {Level.CLASS: "abc"}))
    run = next((root / "runs").iterdir())
    for file in (root / "sets/default.json", run):
        before = file.read_bytes()
        for at in range(0, len(before), 7):
            flip(file, at)
            assert check_records(catalog.folder)[1], (file.name, at)
            assert unsealed_records(catalog.folder) == [], (file.name, at)
            file.write_bytes(before)
    assert check_records(catalog.folder)[1] == []
    assert unsealed_records(catalog.folder) == []
    run.rename(run.with_name("0123456789abcdef.json"))
    assert "whose name is" in str(check_records(catalog.folder)[1][0])


def test_a_set_that_was_deleted_is_missed_unless_it_was_dropped(root: Path) -> None:
    catalog = Catalog(root)
    catalog.write_set("other", catalog.sets()["default"])
    (root / "sets/other.json").unlink()
    assert [finding.place for finding in check_records(catalog.folder)[1]] == ["sets/other.json"]
    catalog.write_set("other", catalog.sets()["default"])
    delete_garbage(catalog, find_garbage(catalog, "other"), unfinished=False, without_set="other")
    assert check_records(catalog.folder)[1] == []


def test_sets_of_older_versions_are_told(root: Path) -> None:
    file = root / "sets/default.json"
    tree = json.loads(file.read_text())
    del tree["sha256"]
    file.write_text(json.dumps(tree))
    assert FeatureCache(root).levels()
    assert unsealed_records(LocalFolder(root)) == ["sets/default.json"]


@pytest.mark.parametrize(
    "name", ["../../outside", "/tmp/outside", "..", ".hidden", "a/b", "a\nb", "a\x1b[2J", "", "x" * 101]
)
def test_names_of_sets_are_checked_where_they_are_written(root: Path, name: str) -> None:
    with pytest.raises(HdovdError, match="cannot be named"):
        Catalog(root).write_set(name, FeatureSet({}))
    assert not (root.parent / "outside.json").exists()


@pytest.mark.parametrize("key", ["../../elsewhere", "a/b", "..", "", "x" * 65])
def test_keys_that_lead_elsewhere_are_no_keys(root: Path, key: str) -> None:
    tree = {"levels": {"class": key}, "skipped": {}, "made_from": {}}
    (root / "sets/default.json").write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"sets/default\.json is damaged .*is no key"):
        FeatureCache(root)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    folder = LocalFolder(tmp_path / "cache")
    for use in (folder.read, folder.exists, folder.delete, folder.sizes, lambda n: folder.write(n, b"x")):
        with pytest.raises(HdovdError, match="is no name of an object"):
            use(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 10**18),
        ("rows", -1),
        ("rows", 2.5),
        ("rows", None),
        ("rows", "5"),
        ("rows", True),
        ("rows", [5]),
        ("part_rows", 0),
        ("part_rows", -1),
        ("part_rows", 1e300),
        ("part_rows", None),
        ("part_rows", 2**40),
        ("dim", -1),
        ("dim", 10**9),
        ("dim", None),
        ("names", 7),
        ("names", ["a"]),
        ("key_inputs", []),
        ("made_with", None),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_they_are_used(root: Path, name: str, value: object) -> None:
    folder, catalog = product(root, Level.NOUN), Catalog(root)
    tree = json.loads((folder / "zarr.json").read_text())
    tree["attributes"][name] = value
    (folder / "zarr.json").write_text(json.dumps(tree))
    reseal(folder, "zarr.json")
    with pytest.raises(HdovdError, match=r"noun/.*zarr\.json is damaged"):
        FeatureCache(root)
    found = ProductCheck(catalog.folder, (Level.NOUN, folder.name), "set default", Checked(), lambda _: None).run()
    assert "the product's metadata" in str(found[0])
    assert next(entry for entry in inventory(catalog.folder, {}) if entry.level is Level.NOUN).state == "damaged"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(shape=[10**15, 4]),
        lambda t: t.update(shape=[-1, 4]),
        lambda t: t.update(shape=[2.5, 4]),
        lambda t: t.update(data_type="made_up"),
        lambda t: t.update(codecs=[{"name": "made_up"}]),
        lambda t: t.update(zarr_format=9),
        lambda t: t["chunk_grid"]["configuration"].update(chunk_shape=[0, 4]),
        lambda t: t.update(node_type="group"),
        lambda t: t["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 4]),
        lambda t: t["chunk_grid"].update(name="made_up"),
        lambda t: t.pop("codecs"),
        lambda t: t.update(fill_value="x"),
    ],
)
def test_arrays_that_cannot_be_are_refused_before_they_are_used(
    root: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = product(root, Level.BOXES)
    before = Product(LocalFolder(root), Level.BOXES, folder.name).table("box")
    tree = json.loads((folder / "box/zarr.json").read_text())
    change(tree)
    (folder / "box/zarr.json").write_text(json.dumps(tree))
    reseal(folder, "box/zarr.json")
    try:
        found = Product(LocalFolder(root), Level.BOXES, folder.name).table("box")
    except HdovdError as error:
        assert re.search(r"boxes/.*box.* damaged", str(error))  # noqa: PT017
    else:  # zarr 3.4 reads what says that it has chunks of 0 rows as it was
        assert tree["chunk_grid"]["configuration"]["chunk_shape"][0] == 0
        np.testing.assert_array_equal(found, before)


def test_levels_of_other_numbers_of_rows_are_refused(root: Path) -> None:
    """Pseudo labels have no table of boxes: fewer rows than boxes would be whole by themselves."""
    folder = product(root, Level.PSEUDO_LABEL)
    tree = json.loads((folder / "zarr.json").read_text())
    tree["attributes"]["rows"] -= 1
    (folder / "zarr.json").write_text(json.dumps(tree))
    reseal(folder, "zarr.json")
    with pytest.raises(HdovdError, match=r"other numbers of rows: boxes \d+, instance \d+, pseudo_label \d+"):
        FeatureCache(root).require_together()


def test_a_product_of_very_many_missing_parts_is_told_shortly(root: Path) -> None:
    labels = Level.PSEUDO_LABEL
    begun = ProductWriter.begin(LocalFolder(root), labels, {"more": 1}, rows=90_000, part_rows=1).product
    found = ProductCheck(begun.folder, (labels, begun.key), "set default", Checked(), lambda _: None).run()
    assert 100 <= len(found) < 200


def test_a_flipped_bit_of_what_is_known_of_pictures_is_a_line(root: Path) -> None:
    """A zip file that is damaged fails in many ways, each with an exception of its own."""
    image = Catalog(root).products(Level.IMAGE)[0]
    files = np.zeros(40, FILE)
    files["image_id"], files["size"] = np.arange(40), np.arange(40) ** 3
    write_files(image, 0, files)
    file = root / image.prefix / "pictures" / "000000.npz"
    before, refused = file.read_bytes(), 0
    for at in range(0, len(before), 3):
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        try:
            assert known_files(image).tobytes() == files.tobytes()
        except HdovdError:
            refused += 1
    assert refused > len(before) / 6
