"""Charts as SVG text, for pages that take no script from elsewhere: lines over a number axis, and matrices.

Called by `report_charts`. Colours are the page's CSS variables, so that a chart is light or dark with its page; what a chart shows is
in its data attribute as well, from which the page's script says the values under the pointer or at the arrow keys.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38
TICKS = 5
INK = (47, 111, 208)  # of matrices; its opacity is the value, so that it goes with any ground


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: points in order; NaN or None breaks it. `series`: which of the page's colours, from 0; None: none of them."""

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
    drawn = [line for line in lines if any(_is_number(v) for v in line.y)]
    if not drawn:
        return Markup('<p class="none">{}: nothing to show</p>').format(title)
    x_low, x_high = _range(x, [v for line in drawn for v in line.x])
    y_low, y_high = _range(y, [v for line in drawn for v in line.y if v is not None and _is_number(v)])

    def at(value: float, low: float, high: float, start: float, stop: float) -> float:
        return start + (stop - start) * (value - low) / (high - low)

    def point(a: float, b: float) -> str:
        return f"{at(a, x_low, x_high, LEFT, WIDTH - RIGHT):.1f},{at(b, y_low, y_high, HEIGHT - BOTTOM, TOP):.1f}"

    parts = []
    for tick in ticks(y_low, y_high):
        height = at(tick, y_low, y_high, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text x="{at(tick, x_low, x_high, LEFT, WIDTH - RIGHT):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                     f'{_short(tick)}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text class="axis" transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="11" text-anchor="middle">'
                 f'{escape(y.label)}</text>')
    for line in drawn:
        style = _style(line.series) + (" dashed" if line.dashed else "")
        for run in _unbroken(line):
            points = [point(a, b) for a, b in run]
            if len(points) > 1:
                parts.append(f'<polyline class="line {style}" points="{" ".join(points)}"/>')
            if line.dots or len(points) == 1:
                for p in points:
                    cx, cy = p.split(",")
                    parts.append(f'<circle class="dot {style}" cx="{cx}" cy="{cy}" r="3"/>')
    data = {"frame": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM], "range": [x_low, x_high, y_low, y_high], "x": x.label,
            "lines": [{"name": line.name, "x": [_rounded(v) for v in line.x], "y": [_rounded(v) for v in line.y]} for line in drawn]}
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(title)}" '
                  f'data-chart="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(parts)}</svg>')


def matrix_chart(title: str, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, low: float, high: float,
                 digits: int = 2, row_title: str = "", column_title: str = "") -> Markup:
    """A figure's SVG of values (n, m), the more inked the nearer to `high`; NaN is left blank. Long names are cut, but not in the data."""
    n, m = values.shape
    cell = 10
    left, top = _margin(rows, cell), _margin(columns, cell)
    width, height = left + m * cell, top + n * cell
    parts = [f'<image x="{left}" y="{top}" width="{m * cell}" height="{n * cell}" href="{_ink(values, low, high)}" '
             f'preserveAspectRatio="none" class="pixels"/>',
             f'<rect class="frame" x="{left}" y="{top}" width="{m * cell}" height="{n * cell}"/>']
    if left > cell:
        parts += [f'<text class="name" x="{left - 3}" y="{top + i * cell + 8}" text-anchor="end">{escape(_cut(name))}</text>'
                  for i, name in enumerate(rows)]
    if top > cell:
        parts += [f'<text class="name" transform="translate({left + j * cell + 8},{top - 3}) rotate(-90)">{escape(_cut(name))}</text>'
                  for j, name in enumerate(columns)]
    data = {"origin": [left, top], "cell": cell, "row": row_title, "rows": list(rows), "column": column_title, "columns": list(columns),
            "values": [[None if math.isnan(v) else round(float(v), digits) for v in row] for row in values.tolist()]}
    return Markup(f'<svg class="matrix" viewBox="0 0 {width} {height}" style="max-width:{max(width * 1.6, 220):.0f}px" role="img" '
                  f'tabindex="0" aria-label="{escape(title)}" data-matrix="{escape(json.dumps(data, separators=(",", ":")))}">'
                  f'{"".join(parts)}</svg>')


def picture_data(picture: Image.Image, form: str = "JPEG", **options: Any) -> str:
    """A picture as a data: address."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, both included where they are round: about `TICKS` of them."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS + 1)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _style(series: int | None) -> str:
    return "plain" if series is None else f"s{series % 8}"


def _ink(values: np.ndarray, low: float, high: float) -> str:
    share = np.nan_to_num(np.clip((values - low) / max(high - low, 1e-12), 0, 1))
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = INK
    pixels[..., 3] = np.round(255 * share)
    return picture_data(Image.fromarray(pixels, "RGBA"), "PNG")


def _margin(names: Sequence[str], cell: int) -> int:
    return cell + round(5.2 * max((len(_cut(name)) for name in names), default=0))


def _cut(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "\N{HORIZONTAL ELLIPSIS}"


def _unbroken(line: Line) -> list[list[tuple[float, float]]]:
    """The runs of points between those without a value."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(line.x, line.y, strict=True):
        if b is None or not _is_number(b):
            runs.append([])
        else:
            runs[-1].append((a, b))
    return [run for run in runs if run]


def _range(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
