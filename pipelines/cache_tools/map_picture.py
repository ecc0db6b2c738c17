"""The picture of a cache's map: a point a box, names at their groups, a legend of the largest groups. Called by `cache_map`."""

from __future__ import annotations

import colorsys
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from hdovd.pipelines.common.label_font import cut_label, label_font

if TYPE_CHECKING:
    from hdovd.pipelines.cache_tools.cache_map import CacheMap

PLOT, MARGIN, PANEL, LINE, FINE = 1_000, 30, 330, 22, 2  # pixels; drawn `FINE` times larger and reduced, for smooth edges
INK, DIM, PAPER, NONE = (25, 25, 28), (105, 105, 112), (255, 255, 255), (190, 190, 196)
GOLDEN_ANGLE = 0.381966
LEAST_LABELLED = 0.01  # of the points: smaller groups have no name in the plot
RADIUS = 3.2


def ordered_groups(groups: list[str]) -> list[tuple[str, int]]:
    """Names and how many points they have, the largest first; without those that have none."""
    return sorted(Counter(name for name in groups if name).items(), key=lambda item: (-item[1], item[0]))


def group_colour(number: int, *, dark: bool = False) -> tuple[int, int, int]:
    """Neighbouring numbers differ most. `dark`: the same hue, lighter, for a dark ground."""
    lightness, saturation = ((0.45, 0.75), (0.62, 0.6), (0.33, 0.6))[number // 3 % 3]
    if dark:
        lightness = 0.48 + lightness / 2.2
    red, green, blue = colorsys.hls_to_rgb(number * GOLDEN_ANGLE % 1, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_map(found: CacheMap) -> Image.Image:
    """A sheet with the plot on the left and the legend on the right. Base boxes are discs, proposals are triangles."""
    groups = found.groups(found.config.colour)
    ordered = ordered_groups(groups)
    colours = {name: group_colour(k) for k, (name, _) in enumerate(ordered)}
    sheet = Image.new("RGB", (PLOT + PANEL, PLOT), PAPER)
    fine = Image.new("RGB", (PLOT * FINE, PLOT * FINE), PAPER)
    pen = ImageDraw.Draw(fine)
    inner = (PLOT - 2 * MARGIN) * FINE
    places = np.stack([MARGIN * FINE + found.seen[:, 0] * inner, MARGIN * FINE + (1 - found.seen[:, 1]) * inner], axis=1)
    order = np.random.default_rng(0).permutation(len(groups))  # no group lies on top of all others
    for k in sorted(order.tolist(), key=lambda k: bool(groups[k])):
        _point(pen, places[k], bool(found.points.base[k]), colours.get(groups[k], NONE))
    sheet.paste(fine.resize((PLOT, PLOT), Image.Resampling.LANCZOS), (0, 0))
    _names(sheet, places / FINE, groups, ordered, colours)
    _legend(sheet, found, ordered, colours)
    return sheet


def _point(pen: ImageDraw.ImageDraw, place: np.ndarray, base: bool, colour: tuple[int, int, int]) -> None:
    x, y, r = float(place[0]), float(place[1]), RADIUS * FINE
    if base:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        pen.polygon([(x, y - 1.3 * r), (x + 1.2 * r, y + 0.9 * r), (x - 1.2 * r, y + 0.9 * r)], fill=colour, outline=PAPER)


def _names(sheet: Image.Image, places: np.ndarray, groups: list[str], ordered: list[tuple[str, int]],
           colours: dict[str, tuple[int, int, int]]) -> None:
    """The name of each large group at the point of it that the others are nearest to."""
    pen = ImageDraw.Draw(sheet)
    for name, count in ordered:
        if count < LEAST_LABELLED * len(groups):
            break
        mine = places[[k for k, group in enumerate(groups) if group == name]]
        middle = mine[np.abs(mine - np.median(mine, axis=0)).sum(axis=1).argmin()]
        dark = tuple(round(v * 0.55) for v in colours[name])
        pen.text((float(middle[0]), float(middle[1])), name, fill=dark, font=label_font(name, 15), anchor="mm", stroke_width=3,
                 stroke_fill=PAPER)


def _legend(sheet: Image.Image, found: CacheMap, ordered: list[tuple[str, int]], colours: dict[str, tuple[int, int, int]]) -> None:
    pen, left, top = ImageDraw.Draw(sheet), PLOT + 10, MARGIN
    font, small = label_font("", 16), label_font("", 13)
    pen.text((left, top), f"{len(found.seen):,d} of {found.points.rows:,d} boxes, by {found.config.colour}", fill=INK, font=font)
    pen.text((left, top + 24), "disc: base box   triangle: proposal", fill=DIM, font=small)
    rows = (PLOT - top - 60 - MARGIN) // LINE
    shown = ordered if len(ordered) <= rows else ordered[: rows - 1]
    for k, (name, count) in enumerate(shown):
        y = top + 56 + k * LINE
        pen.ellipse((left, y + 4, left + 12, y + 16), fill=colours[name])
        shown_name = cut_label(name, PANEL - 90, 13)
        pen.text((left + 20, y + 2), shown_name, fill=INK, font=label_font(shown_name, 13))
        pen.text((PLOT + PANEL - 20, y + 2), f"{count:,d}", fill=DIM, font=small, anchor="ra")
    if len(shown) < len(ordered):
        pen.text((left + 20, top + 58 + len(shown) * LINE), f"and {len(ordered) - len(shown)} more", fill=DIM, font=small)
