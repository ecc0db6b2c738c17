"""What every page is: whole, and closed to anything that is not in it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pytest

from hdovd.pipelines.common.pages import CONTENT_POLICY, page

PAGES = resources.files("hdovd").joinpath("pipelines", "pages")


FILES = sorted(file.name for file in PAGES.iterdir() if file.name.endswith(".html") and file.name != "serve.html")


@pytest.mark.parametrize("template", FILES)  # serve's policy is a header, with a nonce: tests/pipelines/serve
def test_every_page_states_the_policy_before_style_and_script(template: str) -> None:
    text = PAGES.joinpath(template).read_text(encoding="utf-8")
    assert -1 < text.index("{{ policy }}") < text.index("<style>") < text.index("<script>")


def test_the_policy_lets_nothing_be_loaded(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (tmp_path / "x.html").write_text(
        f'<!doctype html>{CONTENT_POLICY}<img id="beside" src="picture.svg"><img id="inside" src="data:image/'
        'svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 width=%229%22 height=%229%22/%3E">'
    )
    opened = browser.new_page()
    opened.goto((tmp_path / "x.html").as_uri())
    width = {name: opened.evaluate(f"document.getElementById('{name}').naturalWidth") for name in ("beside", "inside")}
    opened.close()
    assert width == {"beside": 0, "inside": 9}


def test_what_a_template_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        page("report.html", {})
