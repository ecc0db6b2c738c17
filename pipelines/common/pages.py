"""Pages: one HTML file each that needs nothing else, made of a template in `pipelines/pages` with the style and script
that all pages have; and charts for them as SVG, of the macros in `charts.xml`: lines over a number axis, and matrices.

A chart's colours are the page's CSS variables, so that it is light or dark with its page; what it shows is
in its data attribute as well, from which the page's script says the values under the pointer or at the arrow keys.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageOps

from hdovd.core import __version__, log
from hdovd.pipelines.common.atomic_write import write_text

# Nothing is loaded from anywhere: style, script and pictures are in the page.
CONTENT_POLICY = Markup(
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:\">"
)


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("hdovd", "pipelines/pages")
)


def page(template: str, context: dict[str, Any]) -> str:
    """A template with what all pages have: `css`, `js`, `policy`, `version`. What is not Markup is escaped: names may
    hold anything.
    """
    folder = resources.files("hdovd").joinpath("pipelines", "pages")
    css, js = (Markup(folder.joinpath(name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    own = {"css": css, "js": js, "policy": CONTENT_POLICY, "version": __version__}
    return _ENVIRONMENT.get_template(template).render(own | context)


def write_page(file: Path, template: str, context: dict[str, Any]) -> None:
    """Write a `page`, and say so."""
    write_text(file, page(template, context))
    log(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB, one file that needs nothing else)")


WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
TICKS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: points in order; NaN or None breaks it. `series`: which of the page's colours, from 0; None:
    none of them.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    series: int | None = 0
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """`low` and `high` None: as the lines have it."""

    label: str
    low: float | None = None
    high: float | None = None


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> Markup:
    """A figure's SVG; empty lines are left out. Without any point there is a line of text instead."""
    curves = [
        (line, np.array(line.x, float), np.ma.masked_invalid(np.array(line.y, float)).filled(np.nan)) for line in lines
    ]
    curves = [(line, a, b) for line, a, b in curves if np.isfinite(b).any()]
    if not curves:
        return Markup('<p class="none">{}: nothing to show</p>').format(title)
    x_low, x_high = _range(x, np.concatenate([a for _, a, _ in curves]))
    y_low, y_high = _range(y, np.concatenate([b for _, _, b in curves]))

    def across(value: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * (value - x_low) / (x_high - x_low)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - y_low) / (y_high - y_low)

    drawn = [
        (
            ("plain" if line.series is None else f"s{line.series % 8}") + (" dashed" if line.dashed else ""),
            line.dots,
            [
                [(across(u), up(v)) for u, v in zip(a[run], b[run], strict=True)]
                for run in np.ma.clump_unmasked(np.ma.masked_invalid(b))
            ],
        )
        for line, a, b in curves
    ]
    frame = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    data = {
        "frame": frame,
        "range": [x_low, x_high, y_low, y_high],
        "x": x.label,
        "lines": [{"name": line.name, "x": _values(a), "y": _values(b)} for line, a, b in curves],
    }
    return Markup(
        _charts().line_chart(
            title,
            (WIDTH, HEIGHT),
            frame,
            x.label,
            y.label,
            [(across(tick), _short(tick)) for tick in ticks(x_low, x_high)],
            [(up(tick), _short(tick)) for tick in ticks(y_low, y_high)],
            drawn,
            json.dumps(data, separators=(",", ":")),
        )
    )


def matrix_chart(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    low: float,
    high: float,
    digits: int = 2,
    row_title: str = "",
    column_title: str = "",
) -> Markup:
    """A figure's SVG of values (n, m), the more inked the nearer to `high`; NaN is left blank. Long names are cut, but
    not in the data.
    """
    cell = 10
    short_rows, short_columns = ([_cut(name) for name in names] for names in (rows, columns))
    left, top = (cell + round(5.2 * max(map(len, names), default=0)) for names in (short_rows, short_columns))
    data = {
        "origin": [left, top],
        "cell": cell,
        "row": row_title,
        "rows": list(rows),
        "column": column_title,
        "columns": list(columns),
        "values": [[None if math.isnan(v) else round(float(v), digits) for v in row] for row in values.tolist()],
    }
    return Markup(
        _charts().matrix_chart(
            title,
            _ink(values, low, high),
            cell,
            left,
            top,
            short_rows,
            short_columns,
            json.dumps(data, separators=(",", ":")),
        )
    )


def _charts() -> Any:
    """The macros that write charts as SVG."""
    return _ENVIRONMENT.get_template("charts.xml").module


def picture_data(picture: Image.Image, form: str = "JPEG", **options: Any) -> str:
    """A picture as a data: address."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def small_picture_data(picture: Image.Image, side: int) -> str:
    """A picture as a data: address, reduced to `side` pixels at most."""
    if max(picture.size) > side:
        picture = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
    return picture_data(picture, quality=82)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, both included where they are round: about `TICKS` of them."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS + 1)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ink(values: np.ndarray, low: float, high: float) -> str:
    share = np.nan_to_num(np.clip((values - low) / max(high - low, 1e-12), 0, 1))
    picture = Image.new("RGBA", values.shape[::-1], (47, 111, 208))
    # the opacity is the value, so that it goes with any ground
    picture.putalpha(Image.fromarray(np.round(255 * share).astype(np.uint8)))
    return picture_data(picture, "PNG")


def _cut(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "\N{HORIZONTAL ELLIPSIS}"


def _range(axis: Axis, values: np.ndarray) -> tuple[float, float]:
    """The ends of an axis; `values` may hold NaN."""
    low = float(np.nanmin(values)) if axis.low is None else axis.low
    high = float(np.nanmax(values)) if axis.high is None else axis.high
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _values(numbers: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN: four digits each."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in numbers]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
