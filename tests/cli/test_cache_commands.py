"""`hdovd cache ls | info | diff | gc | verify`: what they print, what they delete, and how they end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_runs import Ran

from hdovd.cache import Catalog, FeatureSet, Level, RunRecord
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip

BROKEN = 12
HOLD = """
import sys, time
from hdovd.cache.store import open_folder
with open_folder(sys.argv[1]).claim(sys.argv[2], wait=False) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(hdovd: Callable[..., Ran]) -> Callable[..., Ran]:
    """`hdovd cache WORDS` in this process."""
    return partial(hdovd, "cache")


@pytest.fixture(scope="module")
def two_sets(
    cache: Path, extraction: Callable[..., ExtractConfig], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The micro world's cache, and in it a set `drawn`: other templates, no proposals, pictures that cannot be read."""
    place = tmp_path_factory.mktemp("two sets")
    broken = Path(shutil.copytree(world, place / "world"))
    for file in sorted((broken / "train2017").iterdir())[:BROKEN]:
        file.write_bytes(b"")
    extract_clip(
        extraction(
            place / "cache",
            data=broken,
            templates=("a drawing of a {}",),
            proposals=None,
            vocabulary=None,
            captions=None,
            features="drawn",
        )
    )
    return Path(
        shutil.copytree(cache, place / "cache", dirs_exist_ok=True)
    )  # the image level of both is one product: the sound one


@pytest.fixture
def copied(two_sets: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_sets, tmp_path / "the cache"))


def _keys(cache: Path, features: str = "default") -> dict[str, str]:
    return dict(json.loads((cache / f"sets/{features}.json").read_text())["levels"])


def _use(cache: Path, run_folder: Path, features: str = "default") -> None:
    """Record a training run, as `hdovd train` does."""
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    Catalog(cache).record_run(
        RunRecord(str(run_folder), {Level(level): key for level, key in _keys(cache, features).items()})
    )


# --- ls ---


def test_ls_lists_products_with_their_users(
    copied: Path, tmp_path: Path, run: Callable[..., Ran], untouched: Callable[[Path], Any]
) -> None:
    _use(copied, tmp_path / "runs" / "first try")
    with untouched(copied):
        ran = run("ls", copied)
    assert ran.code == 0
    rows = {(line.split()[0], line.split()[1]): line for line in ran.lines[1:-1]}
    assert (
        len(rows) == len(ran.lines) - 2 == 9
    )  # six, and boxes, instance and class of the other set: it has the same image level
    default, drawn = _keys(copied), _keys(copied, "drawn")
    for level, key in default.items():
        line = rows[level, key[:12]]
        assert " whole " in line
        assert line.endswith(
            "set default, set drawn, run first try" if drawn.get(level) == key else "set default, run first try"
        )
    assert rows["instance", drawn["instance"][:12]].endswith("  set drawn")
    assert re.search(r" fp32 +\d+ (s|min) ", rows["instance", default["instance"][:12]])
    assert re.search(r"local-dir [0-9a-f]{8} ", rows["class", default["class"][:12]])
    assert re.fullmatch(r"9 products, \d+\.\d kB", ran.lines[-1])
    assert len({len(line[: line.index("  set ")]) for line in ran.lines[1:-1]}) == 1  # columns are columns


def test_ls_says_what_nothing_uses_and_what_is_not_finished(copied: Path, run: Callable[..., Ran]) -> None:
    key = _keys(copied, "drawn")["instance"]
    (copied / "sets/drawn.json").unlink()
    lines = run("ls", copied).lines
    assert lines[-1].startswith("9 products, ")
    assert sum(line.endswith("  -") for line in lines) == 3
    (copied / "instance" / key / "parts/000000.json").unlink()
    lines = run("ls", copied).lines
    assert any(line.startswith("instance") and " 0/1 parts " in line for line in lines)
    assert lines[-1].startswith("9 products (1 not finished), ")


def test_ls_shows_what_is_damaged(copied: Path, run: Callable[..., Ran]) -> None:
    (copied / "instance" / _keys(copied)["instance"] / "zarr.json").write_text("{")
    ran = run("ls", copied)
    assert ran.code == 0
    (line,) = [line for line in ran.lines if " damaged " in line]
    assert line.startswith("instance")
    (copied / "sets/default.json").write_text("{")
    ran = run("ls", copied)
    assert ran.code == 0
    assert "sets/default.json is damaged" in ran.lines[-1]


def test_an_empty_cache_and_none_at_all(tmp_path: Path, run: Callable[..., Ran]) -> None:
    Catalog.create(tmp_path / "cache")
    assert "is empty" in run("ls", tmp_path / "cache").out
    assert "has no set default" in run("info", tmp_path / "cache").err
    assert "nothing to delete" in run("gc", tmp_path / "cache").out
    assert run("verify", tmp_path / "cache").code == 0
    for words in (("ls",), ("info",), ("gc",), ("verify",), ("diff", "a", "b")):
        ran = run(words[0], tmp_path / "none", *words[1:])
        assert (ran.code, ran.out) == (1, "")
        assert "no feature cache" in ran.err
        assert "extract-clip" in ran.err


# --- info ---


def test_info_of_a_set_lists_every_failed_image(
    copied: Path, tmp_path: Path, kept: list[int], run: Callable[..., Ran], untouched: Callable[[Path], Any]
) -> None:
    _use(copied, tmp_path / "runs" / "one", "drawn")
    _use(copied, tmp_path / "runs" / "gone", "drawn")
    shutil.rmtree(tmp_path / "runs" / "gone")
    with untouched(copied):
        out = run("info", copied, "drawn").out
    failed = [image for image in kept if image <= BROKEN]
    assert f"images that could not be read: {len(failed)}; " in out
    for image in failed:
        assert re.search(rf"^  {image}  .*{image:012d}\.jpg: no picture of a kind", out, re.MULTILINE)
    assert "a drawing of a {}" in out
    assert f"  {tmp_path}/runs/one\n" in out
    assert f"  {tmp_path}/runs/gone (gone)\n" in out
    assert "skipped 6: " not in out
    default = run("info", copied).out
    assert default.startswith("set default of ")
    assert re.search(r"^skipped \d+: image with proposals that is not in the training set", default, re.MULTILINE)


def test_info_of_a_product(copied: Path, run: Callable[..., Ran]) -> None:
    key = _keys(copied, "drawn")["instance"]
    out = run("info", copied, key[:6]).out
    assert out.startswith(f"instance {key}\n")
    for word in (
        "clip.weights_sha256",
        "crop.scales",
        "batch_size",
        "1 part of at most 65,536 rows",
        "set drawn",
        "not be read: ",
    ):
        assert word in out
    names = run("info", copied, _keys(copied)["noun"][:6]).out
    assert re.search(r'names +\["anchor", .*\.\.\. \(40 entries\)', names)
    assert "could not be read" not in names


def test_names_that_are_not_there(copied: Path, run: Callable[..., Ran]) -> None:
    ran = run("info", copied, "nothing")
    assert ran.code == 1
    assert "default, drawn" in ran.err
    assert _keys(copied)["noun"][:12] in ran.err
    assert "4 characters" in run("info", copied, _keys(copied)["noun"][:3]).err
    for level, key in (("class", "abcd1" + "0" * 19), ("image", "abcd2" + "0" * 19)):
        (copied / level / key).mkdir()
        (copied / level / key / "zarr.json").write_text("{}")
    ran = run("info", copied, "abcd")
    assert ran.code == 1
    assert "class abcd1" in ran.err
    assert "image abcd2" in ran.err


# --- diff ---


def test_diff_of_sets_goes_level_by_level(
    copied: Path, run: Callable[..., Ran], untouched: Callable[[Path], Any]
) -> None:
    with untouched(copied):
        ran = run("diff", copied, "default", "drawn")
    assert ran.code == 0
    assert 'templates differs: default has ["a photo of a {}"], drawn has ["a drawing of a {}"]' in ran.out
    assert "tokens (what the tokenizer makes of the prompts) differs" in ran.out
    assert re.search(r"^image: the same, ", ran.out, re.MULTILINE)
    total, base = (
        json.loads((copied / "boxes" / _keys(copied, name)["boxes"] / "zarr.json").read_text())["attributes"]["rows"]
        for name in ("default", "drawn")
    )
    assert total > base
    assert f"boxes.count (rows) differs: default has {total}, drawn has {base}" in ran.out
    assert "noun: only default has it" in ran.out
    assert "the cache has" not in ran.out


def test_diff_of_products_and_caches(copied: Path, cache: Path, run: Callable[..., Ran]) -> None:
    default, drawn = _keys(copied), _keys(copied, "drawn")
    out = run("diff", copied, default["class"][:5], drawn["class"][:7]).out
    assert f"{default['class'][:5]} has [" in out
    assert run("diff", copied, drawn["class"], "default").out.count("\n") == out.count("\n")
    same = run("diff", cache, "default", "default", "--other", copied).out
    assert len(re.findall("^[a-z_]+: the same", same, re.MULTILINE)) == 6
    other = run("diff", cache, "default", "drawn", "--other", copied).out
    assert "default has" in other
    ran = run("diff", copied, default["class"], default["noun"])
    assert ran.code == 1
    assert "only products of one level" in ran.err


# --- gc ---


def test_gc_deletes_what_a_dropped_set_alone_used(
    copied: Path,
    cache: Path,
    run: Callable[..., Ran],
    untouched: Callable[[Path], Any],
    contents: Callable[[Path], dict[str, str]],
) -> None:
    assert "nothing to delete" in run("gc", copied).out
    with untouched(copied):
        ran = run("gc", copied, "--drop-set", "drawn")
    drawn, default = _keys(copied, "drawn"), _keys(copied)
    mine = {level: key for level, key in drawn.items() if default[level] != key}
    assert ran.out.count(" whole ") == len(mine) == 3
    assert all(key[:12] in ran.out for key in mine.values())
    assert "nothing was deleted; with --yes" in ran.lines[-1]
    ran = run("gc", copied, "--drop-set", "drawn", "--yes")
    assert ran.lines[-1].startswith("deleted ")
    assert list(Catalog(copied).sets()) == ["default"]
    assert {product.key for product in Catalog(copied).products()} == set(default.values())
    assert contents(copied) == contents(cache)
    ran = run("gc", copied, "--drop-set", "drawn")
    assert ran.code == 1
    assert "no set drawn; it has default" in ran.err


def test_gc_keeps_what_a_run_uses_while_its_folder_is_there(
    copied: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    _use(copied, tmp_path / "run", "drawn")
    assert " whole " not in run("gc", copied, "--drop-set", "drawn").out
    shutil.rmtree(tmp_path / "run")
    ran = run("gc", copied, "--drop-set", "drawn")
    assert ran.out.count(" whole ") == 3
    assert f"  {tmp_path}/run" in ran.lines
    assert len(list((copied / "runs").iterdir())) == 1
    run("gc", copied, "--drop-set", "drawn", "--yes")
    assert list((copied / "runs").iterdir()) == []


def test_gc_deletes_an_unfinished_extraction_only_if_told_to(copied: Path, run: Callable[..., Ran]) -> None:
    """The products that were whole when it was killed belong to it; those of another extraction do not."""
    drawn = _keys(copied, "drawn")
    (copied / "sets/drawn.json").unlink()
    other = copied / "class" / ("f" * 24)
    shutil.copytree(copied / "class" / drawn["class"], other)
    tree = json.loads((other / "zarr.json").read_text())
    tree["attributes"]["key_inputs"]["clip"]["weights_sha256"] = "0" * 64
    (other / "zarr.json").write_text(json.dumps(tree))
    (copied / "instance" / drawn["instance"] / "parts/000000.json").unlink()
    lines = run("gc", copied).lines
    at = next(number for number, line in enumerate(lines) if line.startswith("not finished"))
    assert [line.split()[:2] for line in lines[2:at]] == [["class", "f" * 12]]
    assert {line.split()[0] for line in lines[at + 2 : -1]} == {"boxes", "instance", "class"}
    assert " 0/1 parts " in "\n".join(lines[at:])
    run("gc", copied, "--yes")
    assert not other.exists()
    assert all((copied / level / key / "zarr.json").is_file() for level, key in drawn.items())
    run("gc", copied, "--yes", "--unfinished")
    assert not (copied / "instance" / drawn["instance"]).exists()
    assert {product.key for product in Catalog(copied).products()} == set(_keys(copied).values())


def test_gc_leaves_alone_what_a_process_is_writing(copied: Path, run: Callable[..., Ran]) -> None:
    drawn = _keys(copied, "drawn")
    key = drawn["instance"]
    (copied / "instance" / key / "parts/000000.json").unlink()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copied), f"instance/{key}/0"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            ran = run("gc", copied, "--yes", "--unfinished", "--drop-set", "drawn")
            left = {
                line.split(": ")[1].split()[0]
                for line in ran.lines
                if line.startswith("left alone, an extraction is running")
            }
            assert left == {"boxes", "instance", "class"}  # what the extraction needs besides
            assert ran.lines[-1] == "deleted 0 B"
            assert all((copied / level / key / "zarr.json").is_file() for level, key in drawn.items())
        finally:
            process.kill()
    run("gc", copied, "--yes", "--unfinished")
    assert not (copied / "instance" / key).exists()


def test_gc_sweeps_what_dead_processes_left_half_written(copied: Path, run: Callable[..., Ran]) -> None:
    from hdovd.cache.store import partial_name

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = copied / "class" / partial_name("mine")
    gone = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    for file in (mine, gone):
        file.write_bytes(b"x" * 1_000)
    assert "half-written by processes that are dead: 1 file, 1.0 kB" in run("gc", copied).lines
    assert gone.exists()
    run("gc", copied, "--yes")
    assert (mine.exists(), gone.exists()) == (True, False)


def test_gc_refuses_when_it_cannot_know_what_is_used(
    copied: Path, run: Callable[..., Ran], untouched: Callable[[Path], Any]
) -> None:
    (copied / "runs").mkdir()
    for name in ("runs/0123.json", "sets/drawn.json"):
        (copied / name).write_text("{")
        with untouched(copied):
            ran = run("gc", copied, "--yes")
        assert (ran.code, ran.out) == (1, "")
        assert f"{name} is damaged" in ran.err
        (copied / name).unlink()


# --- verify ---


def test_verify_ends_with_1_if_anything_is_wrong(
    copied: Path, run: Callable[..., Ran], hdovd: Callable[..., Ran], contents: Callable[[Path], dict[str, str]]
) -> None:
    before = contents(copied)
    ran = run("verify", copied)
    assert ran.lines[-1] == "nothing is wrong", ran.out
    key = _keys(copied)["class"]
    shard = copied / "class" / key / "embedding/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-7])
    ran = run("verify", copied)
    assert ran.code == 1
    assert ran.lines[0].startswith(f"class {key[:12]}, part 0, embedding/c/0/0: expected ")
    assert ran.lines[-1] == "1 finding; --repair marks what is damaged as missing"
    assert run("verify", copied, "--features", "drawn").code == 0
    ran = run("verify", copied, "--repair")
    assert (ran.code, ran.lines[-2]) == (1, "1 object marked as missing; now run, to make them again:"), ran.err
    program, command, *arguments = shlex.split(ran.lines[-1])
    assert (program, command) == ("hdovd", "extract-clip")
    again = hdovd(command, *arguments)
    assert again.code == 0, again.err
    assert run("verify", copied).code == 0
    assert contents(copied) == before


def test_verify_samples_with_the_clip_of_the_set(copied: Path, run: Callable[..., Ran], world: Path) -> None:
    ran = run("verify", copied, "--sample", 5, "--seed", 3, "--features", "default", "--data", world)
    assert ran.code == 0, ran.err
    assert (
        len(
            re.findall(
                r"sample of (?:image|instance) [0-9a-f]{12}: [1-5] rows encoded again, cosine min [01]\.\d{4}", ran.out
            )
        )
        == 2
    )


def test_help_says_what_the_commands_are_for(run: Callable[..., Ran]) -> None:
    text = re.sub(r"[\s│]+", " ", run("--help").out)
    for word in ("ls", "info", "diff", "gc", "verify", "--yes deletes it", "set names products that belong together"):
        assert word in text
    for command in ("ls", "info", "diff", "gc", "verify"):
        assert run(command, "--help").code == 0


def test_a_set_without_products_is_shown(copied: Path, run: Callable[..., Ran]) -> None:
    Catalog(copied).write_set("lost", FeatureSet({Level.CLASS: "0" * 24}))
    assert "class 000000000000 is not there: hdovd cache verify" in run("info", copied, "lost").out
    ran = run("verify", copied, "--features", "lost")
    assert ran.code == 1
    assert "class 000000000000, tables, zarr.json: expected the product's metadata, found no such object" in ran.out
