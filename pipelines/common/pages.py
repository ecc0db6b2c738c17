"""Pages: one HTML file each that needs nothing else, made of a template in `pipelines/pages` with the style and script
that all pages have.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hdovd.core import __version__
from hdovd.core.log import log
from hdovd.pipelines.common.atomic_write import write_text

# Nothing is loaded from anywhere: style, script and pictures are in the page.
CONTENT_POLICY = Markup(
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:\">"
)


def page(template: str, context: dict[str, Any]) -> str:
    """A template with what all pages have: `css`, `js`, `policy`, `version`. What is not Markup is escaped: names may
    hold anything.
    """
    folder = resources.files("hdovd").joinpath("pipelines", "pages")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False, loader=jinja2.FunctionLoader(text)
    )
    own = {"css": Markup(text("page.css")), "js": Markup(text("page.js")), "policy": CONTENT_POLICY}
    return environment.get_template(template).render(own | context, version=__version__)


def write_page(file: Path, template: str, context: dict[str, Any]) -> None:
    """Write a `page`, and say so."""
    write_text(file, page(template, context))
    log(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB, one file that needs nothing else)")
