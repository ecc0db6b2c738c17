"""The report in a real browser: nothing on the console, no request, and what can be clicked, typed and dragged does
what it says.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hdovd.data import DataPaths
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.report.report import ReportConfig, report
from hdovd.pipelines.runs import RunFolder


@pytest.fixture(scope="module")
def file(distilled: RunFolder, base_only: RunFolder, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    named = {"distilled": distilled, "base-only": base_only}
    runs = tuple(Path(shutil.copytree(run.path, folder / name)) for name, run in named.items())
    job = ReportConfig(
        runs=runs,
        out=folder / "report",
        data=DataPaths(world),
        gallery=6,
        pseudo=2,
        relation_images=3,
        threshold=0.05,
        device="cpu",
    )
    return report(job)


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, opened; at the end nothing was said on the console, and nothing was asked of any network."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    page, said, asked = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def _column(page: Any, number: int) -> list[str]:
    return [text.strip() for text in page.locator(f"#classes tbody tr td:nth-child({number})").all_inner_texts()]


def test_the_table_of_classes_sorts_by_any_column_by_mouse_and_by_keyboard(page: Any) -> None:
    heads = page.locator("#classes thead th")
    assert _column(page, 1) == [*NOVEL, *BASE]
    heads.nth(0).get_by_role("button").click()
    assert _column(page, 1) == sorted([*NOVEL, *BASE])
    assert heads.nth(0).get_attribute("aria-sort") == "ascending"
    heads.nth(2).get_by_role("button").focus()
    page.keyboard.press("Enter")
    objects = [int(text) for text in _column(page, 3)]
    assert objects == sorted(objects, reverse=True)
    page.keyboard.press("Enter")
    assert [int(text) for text in _column(page, 3)] == sorted(objects)
    heads.nth(3).get_by_role("button").click()  # AP50, where classes without objects have none: these are last
    values = [None if text == "\N{EN DASH}" else float(text) for text in _column(page, 4)]
    numbers = [v for v in values if v is not None]
    assert values == [*sorted(numbers, reverse=True), *[None] * (len(values) - len(numbers))]
    assert len(numbers) < len(values)


def test_the_gallery_filters_by_class_and_by_event(page: Any) -> None:
    cards = page.locator("[data-gallery] .card")
    shown = page.locator("[data-gallery] .card:visible")
    assert shown.count() == cards.count() == 6
    classes = [json.loads(card.get_attribute("data-classes")) for card in cards.all()]
    name = next(n for n in (*NOVEL, *BASE) if 0 < sum(n in of_card for of_card in classes) < 6)
    choose = page.locator('[data-filter="class"]')
    choose.select_option(name)
    assert 0 < shown.count() < 6
    assert all(name in json.loads(card.get_attribute("data-classes")) for card in shown.all())
    assert page.locator('[data-filter="count"]').inner_text() == f"{shown.count()} of 6 images"
    choose.select_option("")
    event = page.locator('[data-filter="event"]')
    event.select_option("novel objects missed")
    assert all("novel objects missed" in json.loads(card.get_attribute("data-events")) for card in shown.all())
    assert shown.count() > 0


def test_the_slider_hides_what_scores_less(page: Any) -> None:
    boxes = page.locator("[data-gallery] g[data-score]")
    scores = [float(box.get_attribute("data-score")) for box in boxes.all()]
    bound = math.floor(100 * max(scores)) / 100  # as the slider has it
    page.locator('[data-filter="score"]').fill(f"{bound:.2f}")
    hidden = [box.get_attribute("hidden") is not None for box in boxes.all()]
    assert hidden == [score < round(bound, 2) for score in scores]
    assert 0 < sum(hidden) < len(hidden)


def test_one_curve_of_the_classes_is_shown(page: Any) -> None:
    curves = page.locator('[data-group="class-curve"]')
    assert [curve.is_visible() for curve in curves.all()].index(True) == 0
    page.locator("[data-shows]").select_option("2")
    assert [k for k, curve in enumerate(curves.all()) if curve.is_visible()] == [2]


def test_charts_say_their_values_to_the_pointer_and_to_arrow_keys(page: Any) -> None:
    tip = page.get_by_role("status").filter(has_text="recall")
    chart = page.locator("#curves svg.chart").first
    chart.hover()
    assert "distilled: " in tip.inner_text()
    assert "base-only: " in tip.inner_text()
    page.mouse.move(0, 0)
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("recall 0\n")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("recall 0.01\n")
    page.keyboard.press("Escape")
    assert tip.count() == 0 or not tip.is_visible()
    matrix = page.locator("#confusion svg.matrix").first
    matrix.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator(".tip").inner_text().startswith(f"object: {NOVEL[1]}\ndetected: {NOVEL[0]}\n")


def test_light_and_dark_by_the_system_and_by_the_button(page: Any) -> None:
    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.get_by_role("button", name="Light / dark").click()
    assert ground() == light
    page.get_by_role("button", name="Light / dark").click()
    assert ground() == dark


@pytest.mark.parametrize("width", [360, 768])
def test_no_width_makes_the_page_scroll_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_everything_that_acts_is_reached_by_the_tab_key(page: Any) -> None:
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => { const a = document.activeElement;
            return a.dataset.filter || a.getAttribute('data-theme-button') !== null && 'theme' || a.dataset.shows
                || a.closest('th') && 'sort' || a.closest('svg') && 'chart' || a.tagName }""")
        )
        if {"class", "event", "score"} <= reached:
            break
    assert {"A", "theme", "sort", "chart", "class-curve", "class", "event", "score"} <= reached


def test_without_scripts_the_page_is_whole(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("[data-gallery] .card:visible").count() == 6
    assert (
        page.locator('[data-group="class-curve"]:visible').count() == page.locator('[data-group="class-curve"]').count()
    )
    assert not page.locator("[data-filter='class']").is_visible()
    context.close()
