"""The tar form: what goes in comes out, in plain webdataset too; damage is found and named; writing goes on where it
was.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.numpy import load, save

from hdovd.cache import DEFAULT_SET, TAR_META, Catalog, Level, is_tar_form, tar_shards
from hdovd.cache.identity import sealed
from hdovd.cache.tar_shards import MEMBERS, TarMeta, TarSample, TarShards, TarWriter, unfinished_shards
from hdovd.core import HdovdError

COUNTS = {40: (2, 3), 7: (1, 0), 19: (0, 0), 23: (3, 1), 2_000_000_000: (1, 2)}
FAILED = {23: "gone.jpg: no such file"}
Make = Callable[..., "Made"]


class Made:
    """Shards of random rows in `folder`, and the samples that went in."""

    def __init__(self, written: Any, folder: Path | str, samples: int, file_name: str = "train/{}.jpg") -> None:
        self.folder, rng = folder, np.random.default_rng(1)
        failed = Catalog(written.path).products(Level.IMAGE)[0].failed()
        self.samples = []
        for image in written.image_ids:
            columns = {array: name for name, (level, array) in MEMBERS.items() if level is not Level.IMAGE}
            arrays = {columns[array]: values for array, values in written.instances[image].items()} | {
                "image": written.images[image]
            }
            about = {"id": image, "file_name": file_name.format(image)} | (
                {"failed": failed[image]} if image in failed else {}
            )
            self.samples.append(TarSample(image, about, None if image in failed else _jpeg(rng), arrays))
        self.writer = TarWriter(folder, TarMeta.of(Catalog(written.path), DEFAULT_SET, samples, {"for": "a test"}))
        self.write()

    def write(self) -> list[int]:
        todo = unfinished_shards(self.writer.folder, range(self.writer.meta.shards))
        for number in todo:
            self.writer.write(number, [self.samples[place] for place in self.writer.meta.places_of(number)])
        return todo


def _jpeg(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of caches that tests share, and what is in them."""
    return tmp_path_factory.mktemp("caches"), {}


@pytest.fixture
def make(write_cache: Callable[..., Any], caches: tuple[Path, dict[str, Any]], tmp_path: Path) -> Make:
    """Write shards, of a cache with the images COUNTS and FAILED among them: `make(folder, samples_a_shard,
    seed=1)`."""

    def run(
        folder: Path | str = tmp_path / "shards",
        samples: int = 2,
        *,
        counts: Any = None,
        failed: Any = None,
        seed: int = 0,
        **changes: Any,
    ) -> Made:
        counts, failed = COUNTS if counts is None else counts, FAILED if failed is None else failed
        what, written = repr((counts, failed, seed)), caches[1]
        if what not in written:
            written[what] = write_cache(caches[0] / str(len(written)), counts, failed=failed, seed=seed)
        return Made(written[what], folder, samples, **changes)

    return run


def _read(shards: TarShards) -> list[TarSample]:
    return [shards.decode(place, raw) for number in shards.numbers for place, raw in shards.raw(number, verify=True)]


def _same(found: TarSample, sample: TarSample) -> None:
    assert found.image_id == sample.image_id
    assert found.picture == sample.picture
    assert {name: value for name, value in found.about.items() if name != "picture"} == sample.about
    assert found.arrays.keys() == sample.arrays.keys()
    for name, array in sample.arrays.items():
        assert found.arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def _record(folder: Path, number: int) -> None:
    """Say of a damaged shard that it is whole, so that only reading finds it."""
    data = (folder / f"{number:06d}.tar").read_bytes()
    (folder / f"{number:06d}.json").write_text(
        json.dumps({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    )


# --- round trip ---


@pytest.mark.parametrize(
    ("where", "file_name"),
    [
        ("local", "train/{}.jpg"),
        ("file://", "Ünïcode {}.JPEG"),
        ("memory://", "{}"),
        ("local", "{}.json"),
        ("local", "a.b.{}.png"),
    ],
)
def test_samples_come_back(make: Make, tmp_path: Path, where: str, file_name: str) -> None:
    folder = str(tmp_path / "shards") if where == "local" else f"{where}{tmp_path}/shards"
    made = make(folder, file_name=file_name)
    shards = TarShards(folder)
    assert (shards.images, shards.numbers) == (5, [0, 1, 2])
    assert shards.failed() == FAILED
    for found, sample in zip(_read(shards), made.samples, strict=True):
        _same(found, sample)
    assert is_tar_form(folder)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 700])), min_size=1, max_size=7),
    samples=st.integers(1, 8),
)
def test_ragged_images_come_back_whatever_the_shards(
    make: Make, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], samples: int
) -> None:
    counts = {3 * number + 1: count for number, count in enumerate(rows)} | {1000: (1, 1)}
    made = make(tmp_path_factory.mktemp("ragged"), samples, counts=counts, failed={})
    shards = TarShards(made.folder)
    assert len(shards.numbers) == -(-len(counts) // samples)
    for found, sample in zip(_read(shards), made.samples, strict=True):
        _same(found, sample)


def test_plain_webdataset_reads_it_with_the_lines_of_the_docstring(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(failed={})
    monkeypatch.chdir(tmp_path)
    lines = textwrap.dedent((tar_shards.__doc__ or "").partition("reads it on its own:\n\n")[2]).strip()
    assert lines.startswith("import webdataset\n")
    assert len([line for line in lines.splitlines() if line]) <= 5
    exec(lines, {})
    assert capsys.readouterr().out.splitlines() == [
        f"train/{image}.jpg (30, 20) ({base + extra}, 4) ({base + extra}, 8)" for image, (base, extra) in COUNTS.items()
    ]


def test_the_same_bytes_at_any_time_and_in_any_order(make: Make, tmp_path: Path) -> None:
    one = make(tmp_path / "one")
    other = make(tmp_path / "other")
    for number in (2, 0, 1):
        other.writer.write(number, [other.samples[place] for place in other.writer.meta.places_of(number)])
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["000000.json", "000000.tar", "000001.json", "000001.tar", "000002.json", "000002.tar", TAR_META]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar.getmembers()} == {(0, 0, 0, "", "")}
    assert one.writer.meta.to_bytes() == other.writer.meta.to_bytes()


def test_what_failed_has_no_picture_and_says_why(make: Make, tmp_path: Path) -> None:
    make()
    with tarfile.open(tmp_path / "shards" / "000001.tar") as tar:
        assert next(name for name in tar.getnames() if name.startswith("000000000023.")) == "000000000023.json"
        file = tar.extractfile("000000000023.json")
        assert file is not None
        assert json.load(file)["failed"] == FAILED[23]


# --- which shards ---


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("/{000000..000001}.tar", [0, 1]),
        ("/000002.tar", [2]),
        ("/{000002,000000}.tar", [2, 0]),
        ("/{000000..000002}.tar", [0, 1, 2]),
        ("/", [0, 1, 2]),
    ],
)
def test_some_shards(make: Make, tmp_path: Path, pattern: str, numbers: list[int]) -> None:
    made = make()
    shards = TarShards(f"{tmp_path}/shards{pattern}")
    assert shards.numbers == numbers
    places = [place for number in numbers for place in made.writer.meta.places_of(number)]
    assert shards.images == len(places)
    assert shards.failed() == {image: why for image, why in FAILED.items() if 1 in numbers}
    assert [sample.image_id for sample in _read(shards)] == [made.samples[place].image_id for place in places]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("shards/000003.tar", "has 3 shards.*000003.tar"),
        ("shards/{000000..000004}.tar", "000003.tar, 000004.tar"),
        ("{shards,other}/000000.tar", "2 folders"),
        ("shards/{000000..000001.tar", "pattern such as"),
        ("nothing", "holds no meta.safetensors"),
        ("nothing/000000.tar", "holds no meta.safetensors"),
    ],
)
def test_shards_that_are_not_there_are_refused(make: Make, tmp_path: Path, pattern: str, said: str) -> None:
    make()
    with pytest.raises(HdovdError, match=said):
        TarShards(f"{tmp_path}/{pattern}")


# --- damage ---


@pytest.mark.parametrize("name", ["000001.tar", "000001.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "empty"])
def test_shards_that_are_not_whole_are_named_at_once(make: Make, tmp_path: Path, name: str, damage: str) -> None:
    make()
    file = tmp_path / "shards" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -10])
    with pytest.raises(HdovdError, match=r"1 of 3 shards.*\(000001\.tar\)"):
        TarShards(tmp_path / "shards")
    assert TarShards(tmp_path / "shards" / "000000.tar").images == 2


def _cuts(file: Path) -> dict[str, int]:
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    second = next(number for number, member in enumerate(members) if member.name.startswith("000000000007"))
    return {
        "in the first file": members[0].offset_data + 100,
        "in a header": members[3].offset + 100,
        "between files": members[4].offset,
        "between samples": members[second].offset,
        "before the last file": members[-1].offset,
        "at once": 0,
    }


@pytest.mark.parametrize(
    "where", ["in the first file", "in a header", "between files", "between samples", "before the last file", "at once"]
)
def test_truncated_shard_is_named_by_who_reads_it(make: Make, tmp_path: Path, where: str) -> None:
    make()
    file = tmp_path / "shards" / "000000.tar"
    file.write_bytes(file.read_bytes()[: _cuts(file)[where]])
    _record(tmp_path / "shards", 0)
    shards = TarShards(tmp_path / "shards")
    with pytest.raises(HdovdError, match=r"shards/000000\.tar"):
        _read(shards)


def test_flipped_byte_is_found_and_named(make: Make, tmp_path: Path) -> None:
    make()
    file = tmp_path / "shards" / "000002.tar"
    data = bytearray(file.read_bytes())
    data[700] ^= 1  # in the picture
    file.write_bytes(data)
    shards = TarShards(tmp_path / "shards")
    for number in (0, 1):
        shards.verify(number)
    with pytest.raises(HdovdError, match=r"000002\.tar: sample 002000000000 is damaged, by its checksum"):
        shards.verify(2)


def test_shard_of_another_export_is_refused(make: Make, tmp_path: Path) -> None:
    make()
    shutil.copy(tmp_path / "shards" / "000000.tar", tmp_path / "shards" / "000001.tar")
    _record(tmp_path / "shards", 1)
    shards = TarShards(tmp_path / "shards")
    with pytest.raises(HdovdError, match=r"000001\.tar holds sample 000000000040 where 000000000019 is expected"):
        _read(shards)


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("run by a reader",)


def _npy_with_code() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([_Evil()], object), allow_pickle=True)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_npy_with_code(), "Object arrays"),
        (pickle.dumps(_Evil()), "damaged"),
        (b"", "damaged"),
        (_npy(np.zeros((4, 8), np.float16)), r"\(5, 8\)"),
        (_npy(np.zeros((5, 9), np.float16)), r"\(5, 8\)"),
        (_npy(np.zeros((5, 8), np.float32)), "float32"),
        (None, "lacks 'instance.npy'"),
    ],
)
def test_rows_that_do_not_fit_are_named_and_run_no_code(
    make: Make, tmp_path: Path, data: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    file = tmp_path / "shards" / "000000.tar"
    with tarfile.open(file) as tar:
        content = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    with tarfile.open(file, "w") as tar:
        for name, kept in content.items():
            new = data if name == "000000000040.instance.npy" else kept
            if new is not None:
                member = tarfile.TarInfo(name)
                member.size = len(new)
                tar.addfile(member, io.BytesIO(new))
    _record(tmp_path / "shards", 0)
    with pytest.raises(HdovdError, match=rf"000000\.tar: sample 000000000040 .*{said}"):
        _read(TarShards(tmp_path / "shards"))
    assert "run by a reader" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "no json", "key", "schema", "tensor"])
def test_damaged_meta_is_named(make: Make, tmp_path: Path, damage: str) -> None:
    from safetensors.numpy import load, save

    meta = make().writer.meta
    file = tmp_path / "shards" / TAR_META
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tree = json.loads(header["__metadata__"]["hdovd"])
    if damage == "key":
        tree["products"]["image"]["attributes"]["key_inputs"]["clip"]["weights"] = "w2"
    if damage == "schema":
        tree["schema_version"] += 1
    tensors = load(data)
    if damage == "tensor":
        tensors["offset"] = tensors["offset"][:-1]
    file.write_bytes(
        {"cut": data[:-100], "no json": save(tensors, {"other": "x"})}.get(
            damage, save(tensors, {"hdovd": json.dumps(tree)})
        )
    )
    with pytest.raises(HdovdError, match=TAR_META):
        TarShards(tmp_path / "shards")
    file.write_bytes(meta.to_bytes())
    assert TarShards(tmp_path / "shards").images == 5


# --- going on ---


def test_writing_goes_on_where_it_was(make: Make, tmp_path: Path) -> None:
    make()
    folder = tmp_path / "shards"
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    (folder / "000001.json").unlink()  # killed after the shard, before its record
    (folder / "000002.tar").unlink()
    (folder / ".partial-host-1-x").write_bytes(b"half")
    assert make().write() == []  # `make` itself has written them
    after = {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.iterdir()
        if not file.name.startswith(".")
    }
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert [name for name in sorted(after) if after[name] == before[name]] == ["000000.json", "000000.tar", TAR_META]


def test_other_content_is_never_mixed(make: Make, tmp_path: Path) -> None:
    make()
    before = {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    others = (
        ({"seed": 1}, "sha256"),
        ({"samples": 3}, "samples differs"),
        ({"counts": {5: (1, 1)}, "failed": {}}, "rows differs"),
    )
    for changes, said in others:
        with pytest.raises(HdovdError, match=f"something else(.|\n)*{said}"):
            make(**changes)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.tex").write_text("")
    with pytest.raises(HdovdError, match=r"not empty.*thesis"):
        make(tmp_path / "busy")
    assert {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()} == before


def test_a_cache_is_no_tar_form(write_cache: Callable[..., Any], tmp_path: Path) -> None:
    assert not is_tar_form(write_cache(tmp_path / "cache").path)
    assert not is_tar_form(tmp_path / "nothing")
    assert is_tar_form(tmp_path / "shards" / "{000000..000002}.tar")


# --- damage, and what a stranger made up ---


def test_a_sample_that_is_damaged_is_never_given_out(make: Make, tmp_path: Path) -> None:
    """By its own checksum, before the shard was read to its end; a record of an older version has none, and the end
    tells.
    """
    make()
    file, record = tmp_path / "shards" / "000001.tar", tmp_path / "shards" / "000001.json"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    stream = TarShards(tmp_path / "shards").raw(1)
    with pytest.raises(HdovdError, match=r"000001\.tar: sample \d+ is damaged, by its checksum"):
        next(stream)
    tree = json.loads(record.read_text())
    del tree["crc32"]
    record.write_text(json.dumps(tree))
    stream = TarShards(tmp_path / "shards").raw(1)
    next(stream)
    with pytest.raises(HdovdError, match=r"000001\.tar is damaged"):
        list(stream)


def rewrite_meta(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what meta.safetensors says, with the checksum."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tree = json.loads(header["__metadata__"]["hdovd"])
    change(tree)
    file.write_bytes(save(load(data), {"hdovd": json.dumps(sealed(tree))}))


def test_a_flipped_bit_of_the_meta_is_found(make: Make, tmp_path: Path) -> None:
    make()
    file = tmp_path / "shards" / TAR_META
    before = file.read_bytes()
    for at in range(0, len(before), max(1, len(before) // 60)):
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        with pytest.raises(HdovdError, match=rf"{TAR_META} (is damaged|has cache schema)"):
            TarShards(tmp_path / "shards")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(samples=-1),
        lambda t: t.update(samples="3"),
        lambda t: t.update(samples=2.5),
        lambda t: t.update(samples=None),
        lambda t: t.update(name="../../outside"),
        lambda t: t.update(name="a\x1b[2J"),
        lambda t: t.update(name=7),
        lambda t: t.update(set=[]),
        lambda t: t["set"]["levels"].update({"class": "../../outside"}),
        lambda t: t["set"]["levels"].pop("boxes"),
        lambda t: t["products"]["boxes"]["attributes"].update(rows=-1),
        lambda t: t["products"]["boxes"]["attributes"].update(rows="9"),
        lambda t: t["products"]["instance"]["attributes"].update(rows=10**18),
        lambda t: t["products"]["instance"]["attributes"].update(part_rows=0),
        lambda t: t["products"]["class"]["attributes"].update(dim=-4),
        lambda t: t["products"]["class"].update(records=3),
        lambda t: t["products"].update(instance=None),
        lambda t: t.update(products={}),
        lambda t: t.pop("about"),
    ],
)
def test_meta_that_was_made_up_is_a_line(
    make: Make, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    make()
    rewrite_meta(tmp_path / "shards" / TAR_META, change)
    with pytest.raises(HdovdError, match=rf"{TAR_META} is damaged"):
        TarShards(tmp_path / "shards")
