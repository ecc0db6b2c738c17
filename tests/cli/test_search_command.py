"""`hdovd search`: what it prints, and what it says of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import Ran


def test_a_table_and_json(cache: Path, kept: list[int], hdovd: Callable[..., Ran]) -> None:
    ran = hdovd("search", cache, "--like", f"{kept[2]}:1", "-k", "3")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split()[:4] == ["#", "cosine", "image:row", "source"]
    assert len(lines) == 4
    first = json.loads(hdovd("search", cache, "--like", f"{kept[2]}:1", "-k", "3", "--json").out)[0]
    assert (first["image_id"], first["row"]) == (kept[2], 1)
    assert lines[1].split()[:3] == ["1", f"{first['cosine']:.3f}", f"{kept[2]}:1"]


def test_words_weights_and_filters(cache: Path, hdovd: Callable[..., Ran], tmp_path: Path) -> None:
    ran = hdovd("search", cache, "tree", "bell=2", "--not", "lamp=0.5", "--source", "base", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert len(found) == 20
    assert {hit["source"] for hit in found} == {"base"}
    ran = hdovd("search", cache, "--suspicious", "-k", "2", "--out", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    assert f"wrote {tmp_path / 'page.html'}" in ran.out
    assert any(line.endswith("its cosine") for line in ran.out.splitlines())


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_base_boxes_without_names_are_told_once(
    cache: Path, world: Path, kept: list[int], hdovd: Callable[..., Ran], form: list[str]
) -> None:
    """The cache does not hold them. Where standard output is JSON, it is no more."""
    note = "note: base boxes are without names, which the annotations alone have: --data reads them\n"
    words = ("search", cache, "--like", f"{kept[2]}:0", *form)
    ran = hdovd(*words, "--source", "base")
    assert (ran.code, ran.err) == (0, note)
    assert not form or {hit["name"] for hit in json.loads(ran.out)} == {""}
    for more in (("--source", "base", "--data", world), ("--source", "proposal")):
        ran = hdovd(*words, *more)
        assert (ran.code, ran.err) == (0, "")
    assert not form or "" in {hit["name"] for hit in json.loads(ran.out)}  # of proposals: without a noun


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "expected one question"),
        (("a", "--duplicates", "boxes"), "expected one question"),
        (("a", "--box", "1,2"), "--box 1,2: expected x,y,w,h in pixels"),
        (("--like", "nothing"), "--like nothing: expected IMAGE_ID:ROW"),
        (("--embeddings", "no.npy"), "--embeddings: no file no.npy"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], why: str, cache: Path, hdovd: Callable[..., Ran]) -> None:
    ran = hdovd("search", cache, *words)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith("error: ")
    assert why in ran.err
