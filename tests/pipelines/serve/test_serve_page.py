"""The page in a real browser: pictures, names, boxes, examples, searches and downloads; nothing is asked of others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.search.config import SearchConfig
from hdovd.pipelines.search.search import search

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture
def page(browser: Any, served: str) -> Iterator[Any]:
    """The page, opened; at the end nothing was said on the console, and nothing was asked of another host."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, color_scheme="light", accept_downloads=True)
    page, said, asked = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: said.append("a dialog"))
    page.goto(served)
    yield page
    context.close()
    assert [line for line in said if "status of 422" not in line] == []
    assert [url for url in asked if not url.startswith((f"{served}/", "data:", f"blob:{served}/"))] == []


@pytest.fixture(scope="module")
def pictures(world: Path) -> list[Path]:
    return sorted((world / "val2017").iterdir())[:2]


def _done(page: Any) -> None:
    page.locator("#said", has_text=re.compile("^done$")).wait_for()


def _find(page: Any, names: str) -> None:
    page.get_by_label("Names, with").fill(names)
    page.get_by_role("button", name="Find").click()
    _done(page)


def _saved(page: Any, button: Any) -> Any:
    with page.expect_download() as download:
        button.click()
    return json.loads(Path(download.value.path()).read_text())


def test_pictures_and_names_give_boxes(page: Any, pictures: list[Path], distilled: RunFolder) -> None:
    page.get_by_label("Drop pictures here").set_input_files(pictures)
    _done(page)
    names = [distilled.protocol().novel[0], distilled.protocol().base[0], MARKUP.replace("(1)", "")]
    _find(page, ", ".join(names))
    page.get_by_label("Score from").fill("0")
    detector = Detector.from_run(distilled.path, device="cpu").set_classes(names)
    tree = _saved(page, page.locator("#save-detections"))
    assert [one["file"] for one in tree] == [picture.name for picture in pictures]
    for number, (picture, one) in enumerate(zip(pictures, tree, strict=True)):
        found = detector(picture, 0.0)
        assert [box["name"] for box in one["detections"]] == list(found.names)
        figure = page.locator(".shot").nth(number)
        assert figure.locator("g").count() == len(found.names) > 5
        assert figure.locator("g.base").count() == sum(name == names[1] for name in found.names)
        scene, box = figure.locator("svg").bounding_box(), figure.locator("g").last.locator("rect").bounding_box()
        left, top, _, bottom = found.boxes[0].tolist()  # the best is drawn last
        scale = scene["width"] / one["width"]
        assert scene["height"] == pytest.approx(scale * one["height"], rel=0.02)
        assert box["x"] - scene["x"] == pytest.approx(scale * left, abs=4)
        assert box["height"] == pytest.approx(scale * (bottom - top), abs=6)
    scores = sorted(box["score"] for one in tree for box in one["detections"])
    page.get_by_label("Score from").fill("1")
    assert page.locator("g[data-score]:visible").count() == 0
    assert page.locator("figcaption").first.inner_text() == "nothing found"
    assert len(scores) > 10


def test_a_drop_is_a_choice(page: Any, pictures: list[Path]) -> None:
    data = page.evaluate_handle(
        "bytes => { const all = new DataTransfer(); "
        "all.items.add(new File([new Uint8Array(bytes)], 'dropped.jpg')); return all; }",
        list(pictures[0].read_bytes()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    _done(page)
    assert page.locator(".shot img").get_attribute("alt") == "dropped.jpg"
    page.get_by_role("button", name="Remove dropped.jpg").click()
    assert page.locator(".shot").count() == 0


def test_what_is_no_picture_is_said_at_its_place(page: Any, tmp_path: Path, pictures: list[Path]) -> None:
    (tmp_path / f"{MARKUP.replace('/', '')}.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(bytes(300_000))
    page.get_by_label("Drop pictures here").set_input_files([*sorted(tmp_path.iterdir()), pictures[0]])
    _done(page)
    said = page.locator("figcaption").all_inner_texts()
    assert said[0] == "the picture: no picture of a kind that Pillow reads"
    assert said[1].startswith("0.3 MB, more than the 0.2 MB that are taken here")
    assert page.locator(".shot").nth(2).locator("g").count() > 0
    _find(page, "a\u202eb")
    assert "names" in page.locator("figcaption.bad").last.inner_text()


def _draw(page: Any, number: int = 0) -> list[int]:
    """Draws a box; returns left, top, width and height as the page has them."""
    scene = page.locator(".shot svg").nth(number).bounding_box()
    page.locator(".shot svg").nth(number).scroll_into_view_if_needed()
    scene = page.locator(".shot svg").nth(number).bounding_box()
    page.mouse.move(scene["x"] + scene["width"] * 0.2, scene["y"] + scene["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(scene["x"] + scene["width"] * 0.6, scene["y"] + scene["height"] * 0.5)
    page.mouse.move(scene["x"] + scene["width"] * 0.7, scene["y"] + scene["height"] * 0.8)
    page.mouse.up()
    return [int(value) for value in page.get_by_label("Box on the chosen picture").input_value().split(",")]


def test_a_drawn_box_is_searched_for(page: Any, pictures: list[Path], cache: Path) -> None:
    page.get_by_label("Drop pictures here").set_input_files(pictures[:1])
    _done(page)
    box = _draw(page)
    sides = page.locator(".shot svg").evaluate("svg => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height]")
    shares = [0.2 * sides[0], 0.3 * sides[1], 0.5 * sides[0], 0.5 * sides[1]]
    assert box == [pytest.approx(share, abs=1.5) for share in shares]
    page.get_by_label("How many").fill("6")
    page.get_by_role("button", name="Search the cache for this box").click()
    page.wait_for_selector("#hits .card")
    hits = _saved(page, page.locator("#save-hits"))
    config = SearchConfig(cache=cache, image=(str(pictures[0]),), box=tuple(box), count=6, device="cpu")  # type: ignore[arg-type]
    assert [f"{hit['image_id']}:{hit['row']}" for hit in hits] == [hit.place for hit in search(config)]
    assert "crop" not in hits[0]
    assert all(page.evaluate("[...document.querySelectorAll('#hits img')].map(i => i.complete && i.naturalWidth > 1)"))
    page.get_by_label("Box on the chosen picture").fill("1, 2, 30, 20")  # by keyboard
    drawn = page.locator("rect.drawn")
    assert [drawn.get_attribute(name) for name in ("x", "y", "width", "height")] == ["1", "2", "30", "20"]


def test_words_likes_and_pictures_of_hits(page: Any, cache: Path) -> None:
    page.get_by_label("Words").fill("tree")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits .card")
    expected = search(SearchConfig(cache=cache, queries=("tree",), device="cpu"))
    said = page.locator("#hits .card > p .quiet")
    assert said.all_inner_texts() == [f"{hit.place}, {hit.source}" for hit in expected]
    page.locator("#hits .card > button").first.click()
    dialog = page.locator("dialog[open]")
    dialog.wait_for()
    left, top, right, bottom = expected[0].box
    shown, box = (dialog.locator(name).bounding_box() for name in ("img", "rect"))
    width, height = dialog.locator("svg").evaluate("svg => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height]")
    assert shown["height"] <= 0.75 * page.viewport_size["height"]
    assert shown["width"] / shown["height"] == pytest.approx(width / height, rel=0.01)
    across, down = shown["width"] / width, shown["height"] / height
    assert box["x"] == pytest.approx(shown["x"] + left * across, abs=3)
    assert box["y"] == pytest.approx(shown["y"] + top * down, abs=3)
    assert box["width"] == pytest.approx((right - left) * across, abs=4)
    assert box["height"] == pytest.approx((bottom - top) * down, abs=4)
    assert dialog.get_by_role("button", name="Close").bounding_box()["y"] < page.viewport_size["height"]
    page.keyboard.press("Escape")
    page.get_by_role("button", name=f"Search for boxes like {expected[1].place}").click()
    page.locator("#hits .card:first-child .quiet", has_text=f"{expected[1].place},").wait_for()
    assert page.locator("#hits .card b").first.inner_text().endswith(" 1.000")


def test_a_drawn_box_becomes_an_example(page: Any, pictures: list[Path], distilled: RunFolder) -> None:
    from PIL import Image

    page.get_by_label("Drop pictures here").set_input_files(pictures[:1])
    _done(page)
    left, top, width, height = _draw(page)
    page.get_by_label("Its class").fill("part, 17 <b>")
    page.get_by_label("Examples beside names").fill("1")
    page.get_by_role("button", name="Add as example").click()
    page.locator("#examples li").wait_for()
    assert page.locator("#examples li").inner_text().startswith("part, 17 <b>")
    _find(page, "")
    page.get_by_label("Score from").fill("0")
    (one,) = _saved(page, page.locator("#save-detections"))
    assert one["names"] == ["part, 17 <b>"]
    with Image.open(pictures[0]) as picture:
        crop = picture.convert("RGB").crop((left, top, left + width, top + height))
    detector = Detector.from_run(distilled.path, device="cpu").set_examples({"part, 17 <b>": [crop]}, mix=1.0)
    scores = detector(pictures[0], 0.0).scores.tolist()
    assert [box["score"] for box in one["detections"]][:5] == [pytest.approx(score, rel=0.02) for score in scores[:5]]
    page.get_by_role("button", name="Remove the example").click()
    _find(page, "")
    assert len(_saved(page, page.locator("#save-detections"))[0]["names"]) == len(distilled.protocol().names)


def test_everything_has_a_name_and_is_reached_by_keyboard(page: Any, pictures: list[Path]) -> None:
    page.get_by_label("Drop pictures here").set_input_files(pictures)
    _done(page)
    controls = "input, textarea, select, button"
    assert (
        page.evaluate(
            f"[...document.querySelectorAll('{controls}')].filter("
            "c => !(c.labels?.length || c.textContent.trim() || c.ariaLabel)).length"
        )
        == 0
    )
    wanted = page.evaluate(f"[...document.querySelectorAll('{controls}')].filter(c => c.checkVisibility()).length")
    reached = set[str]()
    page.evaluate(f"[...document.querySelectorAll('{controls}')].forEach((c, k) => {{ c.dataset.k = k; }})")
    for _ in range(wanted + 12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.k ?? ''"))
    assert len(reached - {""}) == wanted


def test_light_and_dark(page: Any) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.locator("[data-theme-button]").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
