"""The page of a search in a real browser: crops, and pictures on a click or by keyboard; nothing is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdovd.pipelines.search.config import SearchConfig
from hdovd.pipelines.search.search import Hit, search

QUERY = "<i>tree</i>"


@pytest.fixture(scope="module")
def made(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Hit]]:
    file = tmp_path_factory.mktemp("search") / "page.html"
    return file, search(SearchConfig(cache=cache, queries=(QUERY,), out=file, count=6, device="cpu"))


@pytest.fixture
def page(browser: Any, made: tuple[Path, list[Hit]]) -> Iterator[Any]:
    """The page, opened; at the end nothing was said on the console, and nothing was asked of any network."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, color_scheme="light")
    page, said, asked = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(made[0].as_uri())
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_crops_are_shown_best_first_and_names_are_text(page: Any, made: tuple[Path, list[Hit]]) -> None:
    assert page.locator("h1").inner_text() == QUERY
    said = page.locator(".card > p .quiet").all_inner_texts()
    assert said == [f"{hit.place}, {hit.source}" for hit in made[1]]
    assert all(page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 1)"))


def test_a_click_shows_the_picture_with_the_box(page: Any, made: tuple[Path, list[Hit]]) -> None:
    page.locator(".card > button").nth(1).click()
    dialog = page.locator("dialog[open]")
    assert dialog.count() == 1
    box = dialog.locator("rect").bounding_box()
    picture = dialog.locator("svg").bounding_box()
    left, top, right, bottom = made[1][1].box
    shown = dialog.locator("svg").evaluate("svg => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height]")
    scale = min(picture["width"] / shown[0], picture["height"] / shown[1])
    assert box["width"] == pytest.approx((right - left) * scale, abs=4)
    assert box["height"] == pytest.approx((bottom - top) * scale, abs=4)
    dialog.get_by_role("button").click()
    assert page.locator("dialog[open]").count() == 0


def test_everything_is_reached_by_keyboard(page: Any) -> None:
    page.locator(".card > button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.opens") == "box2"


def test_light_and_dark(page: Any) -> None:
    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = ground()
    page.emulate_media(color_scheme="dark")
    assert ground() != light
    page.locator("[data-theme-button]").click()
    assert ground() == light
