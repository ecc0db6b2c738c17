"""Hits of a search: filters, labels that are doubtful, duplicates, and what is written of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdovd.cache import Level, Source
from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.search.config import BoxSource, Duplicates, SearchConfig
from hdovd.pipelines.search.search import Hit, search, search_lines

EVERY = 9_999


@pytest.fixture
def hits(cache: Path, kept: list[int]) -> Callable[..., list[Hit]]:
    """The hits of a question; of a box of the set, if there is no other."""

    def run(**asked: Any) -> list[Hit]:
        other = {"suspicious", "duplicates", "untypical"} & asked.keys()
        values: dict[str, Any] = {"cache": cache, "device": "cpu", "count": EVERY} | asked
        return search(SearchConfig(**(values if other else {"like": (f"{kept[0]}:0",)} | values)))

    return run


@pytest.fixture
def truth(world: Path) -> dict[int, str]:
    """The class of every annotation of a base class."""
    protocol = load_protocol(str(world / "protocol.toml"))
    split = DataPaths(world).load("train2017", protocol, base_only=True)
    pairs = [zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True) for image in split.images]
    return {number: protocol.base[label] for image in pairs for number, label in image}


def test_all_boxes_are_found_and_the_box_itself_first(cache: Path, kept: list[int], hits: Callable[..., Any]) -> None:
    found, opened = hits(), FeatureCache(cache)
    assert len(found) == len(opened.row_images())
    assert (found[0].place, found[0].source) == (f"{kept[0]}:0", "base")
    assert found[0].cosine == pytest.approx(1, abs=1e-6)
    nouns = opened.names(Level.NOUN)
    for hit in found[::7]:
        rows = opened.instances(hit.image_id)
        assert hit.box == tuple(rows.box[hit.row].tolist())
        named = rows.source[hit.row] == Source.PROPOSAL and rows.noun[hit.row] >= 0
        assert hit.name == (nouns[rows.noun[hit.row]] if named else "")


def test_filters(cache: Path, hits: Callable[..., list[Hit]], truth: dict[int, str]) -> None:
    opened = FeatureCache(cache)
    whole = {hit.place: hit for hit in hits(data=None)}

    def of(**asked: Any) -> set[str]:
        places = {hit.place for hit in hits(**asked)}
        assert 0 < len(places) < len(whole)
        return places

    assert of(source=BoxSource.BASE) == {place for place, hit in whole.items() if hit.source == "base"}
    assert of(source=BoxSource.PROPOSAL) == {place for place, hit in whole.items() if hit.source == "proposal"}
    noun = next(hit.name for hit in whole.values() if hit.name)
    assert of(noun=noun) == {place for place, hit in whole.items() if hit.name == noun}
    sides = {p: min(h.box[2] - h.box[0], h.box[3] - h.box[1]) for p, h in whole.items()}
    assert of(min_side=20.0) == {place for place, side in sides.items() if side >= 20}
    assert of(score=0.5) == {place for place, hit in whole.items() if (hit.score or 0) >= 0.5}
    name = next(iter(truth.values()))
    wanted = set()
    for image_id in opened.image_ids().tolist():
        ids = opened.instances(image_id).annotation_id.tolist()
        wanted |= {f"{image_id}:{row}" for row, number in enumerate(ids) if truth.get(number) == name}
    assert of(class_=name) == wanted
    assert {hit.name for hit in hits(class_=name)} == {name}


def test_suspicious_boxes_are_all_that_speak_for_another_class(
    cache: Path, hits: Callable[..., list[Hit]], truth: dict[int, str], world: Path
) -> None:
    opened, base = FeatureCache(cache), load_protocol(str(world / "protocol.toml")).base
    texts, expected = normalised_rows(opened.class_embeddings(base)), {}
    for image_id in opened.image_ids().tolist():
        rows = opened.instances(image_id)
        for row in np.flatnonzero(rows.source == Source.BASE_BOX).tolist():
            cosines = texts @ normalised_rows(rows.embedding[row : row + 1])[0]
            own, other = base.index(truth[int(rows.annotation_id[row])]), int(cosines.argmax())
            if own != other:
                expected[f"{image_id}:{row}"] = (base[own], base[other], cosines[own], cosines[other])
    found = hits(suspicious=True)
    assert {hit.place for hit in found} == expected.keys()
    for hit in found:
        own_name, other_name, own_cosine, other_cosine = expected[hit.place]
        assert (hit.name, hit.other) == (own_name, other_name)
        assert (hit.cosine, hit.other_cosine) == pytest.approx((own_cosine, other_cosine), abs=1e-5)
    more = [(hit.other_cosine or 0) - hit.cosine for hit in found]
    assert more == pytest.approx(sorted(more, reverse=True), abs=1e-5)


def test_untypical_boxes_of_a_class_are_least_like_its_mean(
    cache: Path, hits: Callable[..., list[Hit]], truth: dict[int, str]
) -> None:
    name = max(set(truth.values()), key=list(truth.values()).count)
    found, opened = hits(untypical=name), FeatureCache(cache)
    assert len(found) == list(truth.values()).count(name)
    rows = normalised_rows(np.stack([opened.instance_embeddings(hit.image_id)[hit.row or 0] for hit in found]))
    mean = rows.sum(axis=0) / np.linalg.norm(rows.sum(axis=0))
    assert [hit.cosine for hit in found] == pytest.approx(np.sort(rows @ mean), abs=1e-5)


def test_a_picture_that_is_there_twice_is_found_with_its_boxes(
    copied_world: Path, extraction: Callable[..., ExtractConfig], tmp_path: Path, kept: list[int]
) -> None:
    tree = json.loads((copied_world / "annotations" / "instances_train2017.json").read_text())
    images = {image["id"]: image for image in tree["images"]}
    twin = {**images[kept[0]], "id": 777, "file_name": "twin.jpg"}
    shutil.copy(copied_world / "train2017" / images[kept[0]]["file_name"], copied_world / "train2017" / "twin.jpg")
    tree["images"].append(twin)
    boxes = [entry for entry in tree["annotations"] if entry["image_id"] == kept[0]]
    tree["annotations"] += [{**entry, "image_id": 777, "id": 5_000 + entry["id"]} for entry in boxes]
    (copied_world / "annotations" / "instances_train2017.json").write_text(json.dumps(tree))
    cache = tmp_path / "cache"
    extract_clip(extraction(cache, data=copied_world, proposals=None, vocabulary=None, captions=None))
    asked: dict[str, Any] = {"cache": cache, "device": "cpu", "least": 0.99999, "count": 3}
    (pair,) = search(SearchConfig(duplicates=Duplicates.PICTURES, **asked))
    assert (pair.place, pair.other) == (str(kept[0]), "777")
    assert pair.box == (0, 0, twin["width"], twin["height"])
    found = search(SearchConfig(duplicates=Duplicates.BOXES, **asked))
    assert (found[0].image_id, found[0].other) == (kept[0], f"777:{found[0].row}")


def test_coco_results_and_a_table(cache: Path, kept: list[int], hits: Callable[..., list[Hit]], tmp_path: Path) -> None:
    found = hits(count=2, coco=tmp_path / "found.json")
    left, top, right, bottom = found[1].box
    entry = json.loads((tmp_path / "found.json").read_text())[1]
    assert entry["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    assert (entry["image_id"], entry["score"]) == (found[1].image_id, found[1].cosine)
    lines = search_lines(found, SearchConfig(cache=cache, like=(f"{kept[0]}:0",)))
    assert lines[1].split()[:4] == ["1", "1.000", f"{kept[0]}:0", "base"]
    assert len(lines) == 3
    assert search_lines([], SearchConfig(cache=cache, queries=("a", "b"))) == ["nothing found: a, b"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"class_": "lader"}, "lader: no base class of this set; the nearest: ladder"),
        ({"untypical": "lader"}, "lader: no base class of this set; the nearest: ladder"),
        ({"noun": "umbrela"}, "umbrela: no noun of this set; the nearest: umbrella"),
        ({"suspicious": True, "queries": ("a",)}, "expected one question"),
        ({"like": ()}, "expected one question"),
        ({"box": (0, 0, 2, 2)}, "--box is a box of --image"),
        ({"pretrained": "openai"}, "--pretrained goes with --clip"),
        ({"queries": ("umbrella=-1",)}, "umbrella=-1: a weight is a number above 0"),
        ({"queries": ("umbrella=1e",)}, "umbrella=1e: a weight is a number above 0"),
        ({"like": (), "untypical": "tree", "class_": "bell"}, "--untypical CLASS says the class already"),
        ({"like": (), "duplicates": Duplicates.PICTURES, "min_side": 3.0}, "filters are for --duplicates boxes"),
        ({"out": Path("page.pdf")}, "expected a name that ends in .html"),
    ],
)
def test_questions_that_are_none(asked: dict[str, Any], why: str, hits: Callable[..., list[Hit]]) -> None:
    with pytest.raises(HdovdError, match=why):
        hits(**asked)


def test_a_set_without_boxes(cache: Path, copied_cache: Path) -> None:
    named = copied_cache / "sets" / "default.json"
    tree = json.loads(named.read_text())
    tree["levels"] = {"class": tree["levels"]["class"]}
    tree.pop("sha256", None)
    named.write_text(json.dumps(sealed(tree)))
    with pytest.raises(HdovdError, match="has no instance level"):
        search(SearchConfig(cache=copied_cache, queries=("a",)))
    with pytest.raises(HdovdError, match=r"nothing"):
        search(SearchConfig(cache=copied_cache / "nothing", queries=("a",)))


def test_a_picture_that_is_gone_is_said_on_the_page(
    copied_world: Path, cache: Path, kept: list[int], tmp_path: Path
) -> None:
    for file in (copied_world / "train2017").iterdir():
        file.unlink()
    page = tmp_path / "page.html"
    search(SearchConfig(cache=cache, data=DataPaths(copied_world), like=(f"{kept[0]}:0",), out=page, count=2))
    assert page.read_text().count('<p class="none">') == 2
