"""The page of a cache's map: one HTML file with its data, styles and script inside. Called by `cache_map`; template `pages/cache_map.html`.

Names may hold any characters: the template escapes them, and the data go in as JSON that cannot end its element.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hdovd.core.errors import HdovdError, shorten
from hdovd.pipelines.cache_tools.map_picture import group_colour, ordered_groups
from hdovd.pipelines.common.html_page import page
from hdovd.pipelines.common.images import read_image

if TYPE_CHECKING:
    from hdovd.pipelines.cache_tools.cache_map import CacheMap

CELL = 64  # pixels of a thumbnail's longer side
COLUMNS = 40
QUALITY = 80
STEPS = 10_000  # places in the picture are whole numbers of so many parts


def page_of(found: CacheMap, log: Callable[[str], None]) -> str:
    """The page, whole. Raises nothing for pictures that cannot be read: they are counted, and their points have no thumbnail."""
    sheet, cell_of = _thumbnails(found, log)
    return page("cache_map.html", {
        "source": found.config.source, "figures": found.numbers.lines(found.points.rows),
        "data": _data(found, cell_of) | {"rows": found.points.rows, "sheet": sheet}}, own="cache_map")


def _data(found: CacheMap, cell_of: dict[int, int]) -> dict[str, Any]:
    from hdovd.pipelines.cache_tools.config import Colour

    points = found.points
    colourings, most = {}, 0
    for colour in Colour:
        groups = found.groups(colour)
        ordered = [name for name, _ in ordered_groups(groups)]
        number = {name: k for k, name in enumerate(ordered)}
        most = max(most, len(ordered))
        colourings[str(colour)] = {"names": ordered, "of": [number.get(name, -1) for name in groups]}
    return {
        "x": np.rint(found.seen[:, 0] * STEPS).astype(int).tolist(), "y": np.rint((1 - found.seen[:, 1]) * STEPS).astype(int).tolist(),
        "image": points.image.tolist(), "box": np.rint(points.box).astype(int).tolist(), "base": points.base.astype(int).tolist(),
        "name": points.name, "cosine": _rounded(points.cosine), "nearest": points.nearest, "nearestCosine": _rounded(points.nearest_cosine),
        "score": _rounded(points.score), "colourings": colourings, "colour": str(found.config.colour),
        "palettes": [["#{:02x}{:02x}{:02x}".format(*group_colour(k, dark=dark)) for k in range(most)] for dark in (False, True)],
        "cells": [cell_of.get(k, -1) for k in range(len(points.name))] if cell_of else [], "cell": CELL, "columns": COLUMNS}


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 3) for value in values.tolist()]


def _thumbnails(found: CacheMap, log: Callable[[str], None]) -> tuple[str, dict[int, int]]:
    """A data URL of one JPEG with the crops of some points, and the cell of each; "" and nothing if there are none."""
    wanted = min(found.config.thumbnails, len(found.seen))
    if not wanted or found.pictures is None:
        return "", {}
    split = found.pictures.split
    chosen = np.sort(np.random.default_rng(found.config.seed).choice(len(found.seen), wanted, replace=False))
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-wanted // COLUMNS) * CELL), (127, 127, 127))
    cells, unread, opened = dict[int, int](), dict[object, None](), (-1, Image.new("RGB", (1, 1)))
    for k in chosen.tolist():
        image = found.pictures.images[int(found.points.image[k])]
        if opened[0] != image.id:
            try:
                opened = image.id, read_image(split.path(image), image.width, image.height, exif=split.exif)
            except HdovdError:
                unread[image.id] = None
                continue
        left, top, right, bottom = found.points.box[k].tolist()
        crop = opened[1].crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        scale = CELL / max(crop.size)
        crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))), Image.Resampling.BICUBIC)
        cell = len(cells)
        sheet.paste(crop, (cell % COLUMNS * CELL + (CELL - crop.width) // 2, cell // COLUMNS * CELL + (CELL - crop.height) // 2))
        cells[k] = cell
    if unread:
        log(f"no thumbnails of {len(unread)} pictures, which cannot be read: {shorten([*unread])}")
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), cells
