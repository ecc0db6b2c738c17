"""`hdovd cache map`: its projection, its files, and its page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.cache.identity import sealed
from hdovd.cli.main import main
from hdovd.core.errors import HdovdError
from hdovd.pipelines.cache_tools.cache_map import CacheMap, Colour, MapConfig, map_cache, project
from hdovd.pipelines.cache_tools.map_page import page_of
from hdovd.pipelines.cache_tools.map_picture import draw_map, ordered_groups
from hdovd.pipelines.cache_tools.map_points import MapPoints, measure
from hdovd.pipelines.common.label_font import label_font
from hdovd.pipelines.extraction.source import CacheSource

pytest.importorskip("sklearn", reason="hdovd cache map needs the extra hdovd[map]")
EVIL = ["</script><script>window.broken = 1</script>", "<img src=x onerror='window.broken = 1'>", "\"quotes' & <b>bold</b>",
        "猫 ☂ {{ 7*7 }}"]
COUNTS = (40, 30, 20, 10)  # of the names above


def _silent(_: str) -> None: ...


@pytest.fixture(scope="module")
def evil() -> CacheMap:
    """A map of a hundred boxes, half of them base boxes, whose names would be code if they were not escaped."""
    draw, n = np.random.default_rng(0), sum(COUNTS)
    names = [name for name, count in zip(EVIL, COUNTS, strict=True) for _ in range(count)]
    points = MapPoints(draw.normal(size=(n, 8)).astype(np.float32), np.arange(n) + 1_000, np.full((n, 4), 7, np.float32),
                       np.arange(n).astype(np.uint8) % 2, np.full(n, 0.5, np.float32), names, np.full(n, 0.25, np.float32), names,
                       np.full(n, 0.25, np.float32), names, 0, 12_345)
    seen = draw.uniform(size=(n, 2))
    config = MapConfig(CacheSource("/<i>cache</i>", EVIL[0]))
    return CacheMap(config, points, seen, measure(points, seen), None)


# --- the projection ---

def test_the_projection_keeps_groups_apart_and_follows_from_its_seed() -> None:
    draw = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 25)
    embedding = (np.eye(3, 16)[group] + draw.normal(0, 0.05, (75, 16))).astype(np.float32)
    seen = project(embedding, 0)
    assert seen.shape == (75, 2)
    assert (seen.min(), seen.max()) >= (0, 0)
    assert seen.max() <= 1 + 1e-9
    nearest = np.linalg.norm(seen[:, None] - seen, axis=2) + np.eye(75) * 9
    assert (group[nearest.argmin(axis=1)] == group).mean() > 0.95
    assert np.array_equal(seen, project(embedding, 0))


@pytest.mark.parametrize("embedding", [np.eye(1, 8), np.eye(2, 8), np.eye(4, 8), np.ones((30, 8)), np.ones((6, 1)) * np.arange(6)[:, None]])
def test_few_points_or_all_the_same(embedding: np.ndarray) -> None:
    seen = project(embedding.astype(np.float32), 0)
    assert seen.shape == (len(embedding), 2)
    assert np.isfinite(seen).all()
    assert (seen >= -1e-9).all()
    assert (seen <= 1 + 1e-9).all()


# --- the stage ---

def test_a_cache_becomes_a_page_and_a_picture(cache: Path, tmp_path: Path, untouched: Callable[[Path], Any]) -> None:
    lines = list[str]()
    with untouched(cache):
        found = map_cache(MapConfig(CacheSource(cache), tmp_path / "new" / "map.html", 60, thumbnails=8), lines.append)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["map.html", "map.png"]
    assert len(found.seen) == 60
    assert any("of base boxes are most like" in line for line in lines)
    page = (tmp_path / "new/map.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")  # which is a name, and not loaded
    assert "https://" not in page
    with Image.open(tmp_path / "new/map.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50
    by_source = {name for name, _ in ordered_groups(found.groups(Colour.SOURCE))}
    assert by_source == {"base box", "proposal"}
    for name, noun, class_ in zip(found.groups(Colour.NAME), found.groups(Colour.NOUN), found.groups(Colour.CLASS), strict=True):
        assert (noun or class_) == name
        assert not (noun and class_)


def test_without_the_data_base_boxes_have_no_class(copied_cache: Path, tmp_path: Path) -> None:
    file = copied_cache / "sets/default.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | {"made_from": {}})))
    lines = list[str]()
    found = map_cache(MapConfig(CacheSource(copied_cache), tmp_path / "map.html", 30, thumbnails=3), lines.append)
    assert set(found.groups(Colour.CLASS)) == {""}
    assert any(line.startswith("note: base boxes have no class name") and "--data" in line for line in lines)
    with pytest.raises(HdovdError, match="give --data and --protocol"):
        map_cache(MapConfig(CacheSource(copied_cache, protocol="ov-coco"), tmp_path / "map.html"), _silent)


def test_bad_input(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HdovdError, match=r"ends in \.html"):
        map_cache(MapConfig(CacheSource(cache), tmp_path / "map.png"), _silent)
    with pytest.raises(HdovdError, match="no set of features named other"):
        map_cache(MapConfig(CacheSource(cache, "other"), tmp_path / "map.html"), _silent)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(HdovdError, match=r"pip install 'hdovd\[map\]'"):
        map_cache(MapConfig(CacheSource(cache), tmp_path / "map.html"), _silent)
    assert list(tmp_path.iterdir()) == []


def test_the_command(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["hdovd", "cache", "map", str(cache), "--points", "12", "--color", "source", "--out",
                                      str(tmp_path / "m.html")])
    main()
    assert "figures over 12 sampled rows of " in capsys.readouterr().out


def test_the_picture_names_its_groups(evil: CacheMap) -> None:
    sheet = np.asarray(draw_map(evil))
    assert (sheet != 255).any(axis=2).mean() > 0.005
    assert sheet.shape[0] == 1_000


def test_names_of_other_scripts_are_no_squares_in_the_picture(evil: CacheMap) -> None:
    def drawn(character: str) -> np.ndarray:
        points = dataclasses.replace(evil.points, name=[character] * len(evil.points.name))
        return np.asarray(draw_map(dataclasses.replace(evil, points=points)))

    if label_font("سظ", 13) is label_font("", 13):
        pytest.skip("no font with these characters on this machine")
    assert not np.array_equal(drawn("س"), drawn("ظ"))  # squares are all alike


# --- the page, in a browser ---

@pytest.fixture
def page(evil: CacheMap, browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page, opened from its file; at the end nothing was complained of, nothing loaded, and no name was run as code."""
    (tmp_path / "map.html").write_text(page_of(evil, _silent), encoding="utf-8")
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints, loaded = list[str](), list[str]()
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: loaded.append(request.url))
    opened.goto((tmp_path / "map.html").as_uri())
    yield opened
    assert complaints == []
    assert [url for url in loaded if not url.startswith("data:")] == [(tmp_path / "map.html").as_uri()]
    assert opened.evaluate("window.broken") is None
    opened.close()


INK = """() => {
  const plot = document.getElementById("plot"), copy = document.createElement("canvas");
  copy.width = plot.width; copy.height = plot.height;
  const pen = copy.getContext("2d", {willReadFrequently: true});
  pen.drawImage(plot, 0, 0);
  return pen.getImageData(0, 0, copy.width, copy.height).data.filter((value, k) => k % 4 === 3 && value).length;
}"""  # pixels of the plot that are not empty


def test_names_are_shown_as_they_are(page: Any) -> None:
    assert page.locator("#legend .name").all_inner_texts() == EVIL
    assert [int(count) for count in page.locator("#legend .count").all_inner_texts()] == list(COUNTS)
    assert page.inner_text("h1") == f"Boxes of /<i>cache</i>, set {EVIL[0]}, as CLIP sees them"


def test_the_legend_hides_points(page: Any) -> None:
    assert page.inner_text("#status") == "100 of 100 boxes shown, a sample of the cache's 12,345"
    whole = page.evaluate(INK)
    page.locator("#legend input").first.focus()
    page.keyboard.press("Space")
    assert page.inner_text("#status").startswith("60 of 100 ")
    assert 0 < page.evaluate(INK) < whole
    page.click("#none")
    assert page.inner_text("#status").startswith("0 of 100 ")
    assert page.evaluate(INK) == 0
    page.click("#all")
    assert page.evaluate(INK) == whole


def test_search_and_colouring(page: Any) -> None:
    page.fill("#search", "quotes'")
    assert page.inner_text("#status").endswith("; 20 match")
    assert page.locator("#legend li:visible .name").all_inner_texts() == [EVIL[2]]
    page.fill("#search", "")
    page.select_option("#by", "source")
    assert page.locator("#legend .name").all_inner_texts() == ["base box", "proposal"]
    page.select_option("#by", "noun")
    assert page.locator("#legend .name").all_inner_texts() == [*EVIL, "(others)"]
    page.locator("#legend input").last.uncheck()
    assert page.inner_text("#status").startswith("50 of 100 ")


def test_keyboard_and_pointer_choose_points(page: Any, evil: CacheMap) -> None:
    page.focus("#plot")
    found = set()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "+", "ArrowUp"):
        page.keyboard.press(key)
        found.add(page.inner_text("#found"))
    assert len(found) >= 4
    assert all("Image" in text and "7, 7, 7, 7" in text and "0.250" in text for text in found)
    page.keyboard.press("Escape")
    assert "none chosen" in page.inner_text("#found")
    page.click("#whole")
    wanted = int(evil.seen[:, 0].argmax())
    x, y = page.evaluate(f"() => {{const b = document.getElementById('plot').getBoundingClientRect(), p = place({wanted});"
                         "return [b.left + 1 + p[0], b.top + 1 + p[1]];}")
    page.mouse.move(x, y)
    assert str(1_000 + wanted) in page.inner_text("#found")


def test_light_dark_and_a_phone(page: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
    page.get_by_role("button", name="Light / dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == grounds[0]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#plot").bounding_box()["width"] > 330
    assert page.evaluate(INK) > 0
