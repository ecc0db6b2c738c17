"""Pages: one HTML file each that needs nothing else, made of a template in `pipelines/pages` with the style and script
that all pages have.
"""

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

# Nothing is loaded from anywhere: style, script and pictures are in the page.
CONTENT_POLICY = Markup(
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:\">"
)


def page(template: str, context: dict[str, Any]) -> str:
    """A template with `css` and `js`, what all pages have. What is not Markup is escaped: names may hold anything."""
    folder = resources.files("hdovd").joinpath("pipelines", "pages")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False, loader=jinja2.FunctionLoader(text)
    )
    return environment.get_template(template).render(
        policy=CONTENT_POLICY, **{end: Markup(text(f"page.{end}")) for end in ("css", "js")}, **context
    )
