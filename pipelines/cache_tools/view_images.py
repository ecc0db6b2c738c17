"""`hdovd cache view`: a picture and a table for each image asked for, of what the cache knows of its boxes.

In the picture base boxes are blue and proposals orange: the more a label weighs in training, the stronger the colour.
The numbers of the boxes are those of the table, which stands below it.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError
from hdovd.pipelines.cache_tools.config import ViewConfig
from hdovd.pipelines.cache_tools.view import (
    CacheView,
    ViewRow,
    find_reliability,
    gather_view,
    marked,
    names_and_cosines,
)
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.drawing import BASE_COLOUR, Colour, Labelled, draw_boxes
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.label_font import cut_label, label_font
from hdovd.pipelines.extraction.source import CacheWithData, with_data
from hdovd.pipelines.runs.tables import table_lines

NEAR_IDS = 6  # named where an image is not there
STRONG, WEAK = (240, 95, 0), (255, 222, 178)  # of proposals, whatever their class: not the colour of novel ones
INK, PAPER, GONE = (25, 25, 28), (255, 255, 255), (120, 120, 124)
LONG_SIDE = 1_000  # of the picture on the sheet, pixels
WIDEST_COLUMN = 420
MARGIN, GAP, LINE, SIZE = 16, 18, 22, 14


def view_images(config: ViewConfig, log: Callable[[str], None] = print) -> list[Path]:
    """Draw the images and print their tables; returns the files written. Raises HdovdError for bad input."""
    config.check()
    cache = FeatureCache(config.source.cache, config.source.features)
    ids = chosen_images(cache, config.images, config.seed)
    if config.out.suffix and len(ids) > 1:
        raise HdovdError(f"--out {config.out} is one file, and {len(ids)} images are asked for: give a folder")
    found = with_data(cache, config.source, log)
    reliability = find_reliability(cache, config.calibration, config.recipe, found.protocol.base)
    if reliability is not None:
        log(
            f"weight = {reliability.scale:.4g} * sigmoid((cosine - {reliability.centre:.4g}) / "
            f"{reliability.width:.4g}), by {reliability.source}"
        )
    files = []
    for image_id in ids:
        image = found.images[image_id]
        view = gather_view(
            cache, image_id, image, names=found.protocol.names, file=found.split.path(image), reliability=reliability
        )
        for line in view_lines(view, found.protocol.novel):
            log(line)
        files.append(_draw(view, found, config.out))
        log(f"wrote {files[-1]}")
    return files


def chosen_images(cache: FeatureCache, asked: Sequence[str], seed: int = 0) -> list[int]:
    """The ids that `asked` names, in its order, each once. Raises HdovdError for what the cache does not have."""
    there = cache.image_ids().tolist()
    if not there:
        raise HdovdError(f"{cache.url} has no images")
    if not asked:
        return [next((image for image in there if len(cache.instances(image).box)), there[0])]
    known, ids = set(there), list[int]()
    for word in asked:
        drawn = re.fullmatch(r"random(?::(\d+))?", word)
        if drawn:
            ids += random.Random(seed).sample(there, min(int(drawn[1] or 1), len(there)))
        elif not re.fullmatch(r"-?\d+", word):
            raise HdovdError(
                f"--image {word}: expected an image id, such as {there[0]}, or random:N; several with commas between"
            )
        elif int(word) not in known:
            raise HdovdError(_not_there(cache, int(word), there))
        else:
            ids.append(int(word))
    return list(dict.fromkeys(ids))


def view_lines(view: CacheView, novel: Collection[str] = ()) -> list[str]:
    """The table of an image, for a terminal. Names of `novel` are marked with a star."""
    head, *rows = _cells(view, novel)
    return [
        *_title(view, novel),
        *(table_lines(head, rows, {"#", "cosine", "weight", "score"}) if rows else ()),
        *_foot(view, novel),
    ]


def _title(view: CacheView, novel: Collection[str]) -> list[str]:
    base = sum(row.source is Source.BASE_BOX for row in view.rows)
    of = f", {view.file.name}, {view.size[0]}x{view.size[1]}" if view.file and view.size else ""
    nearest = [f"the whole picture is most like: {names_and_cosines(view.nearest, novel)}"] if view.nearest else []
    return [f"image {view.image_id}{of}: {base} base boxes, {len(view.rows) - base} proposals", *nearest]


def _cells(view: CacheView, novel: Collection[str]) -> list[tuple[str, ...]]:
    """The head and a row a box."""
    cells: list[tuple[str, ...]] = [
        ("#", "", "name", "cosine", "weight", "score", "box: left, top, right, bottom", "nearest class names")
    ]
    for number, row in enumerate(view.rows, 1):
        name = marked(row.name, novel) if row.name else "-"
        if len(row.nouns) > 1:
            name = ", ".join(f"{marked(noun.name, novel)} {noun.share:.0%}" for noun in row.nouns)
        numbers = ("-" if value is None else f"{value:.2f}" for value in (row.cosine, row.weight, row.score))
        cells.append(
            (
                str(number),
                "base" if row.source is Source.BASE_BOX else "proposal",
                name,
                *numbers,
                ", ".join(f"{v:.0f}" for v in row.box),
                names_and_cosines(row.nearest, novel) or "-",
            )
        )
    return cells


def _foot(view: CacheView, novel: Collection[str]) -> list[str]:
    shown = [view.nearest, *(likeness for row in view.rows for likeness in (row.nouns, row.nearest))]
    names = {row.name for row in view.rows} | {one.name for likeness in shown for one in likeness}
    star = ["* a novel class of the protocol"] if names & set(novel) else []
    return star + [f"note: {note}" for note in view.notes]


def _draw(view: CacheView, found: CacheWithData, out: Path) -> Path:
    file = out if out.suffix else out / f"{view.image_id}.png"
    assert view.file is not None and view.size is not None  # noqa: PT018
    problem, picture = "", None
    try:
        picture = read_image(view.file, *view.size, exif=found.split.exif)
    except HdovdError as error:  # an image that the extraction could not read either: its boxes are still to be seen
        problem = f"the picture cannot be read: {error}"
    sheet = draw_view(view, picture, found.protocol.novel, problem)
    write_picture(file, sheet, "PNG")
    return file


def _not_there(cache: FeatureCache, image_id: int, there: Sequence[int]) -> str:
    skipped = [reason for reason, ids in cache.set.skipped.items() if reason.startswith("image") and image_id in ids]
    why = (
        f"it was skipped: {skipped[0]}"
        if skipped
        else "only images with a base box are in a cache"
        if len(there) > 1
        else ""
    )
    near = sorted(sorted(there, key=lambda other: abs(other - image_id))[:NEAR_IDS])
    return (
        f"{cache.url} does not have image {image_id} ({why}). It has {len(there):,d} images, ids {min(there)} to "
        f"{max(there)}; the nearest ids are {', '.join(map(str, near))}. --image random shows any"
    )


def draw_view(
    view: CacheView, picture: Image.Image | None, novel: Collection[str] = (), problem: str = ""
) -> Image.Image:
    """A sheet with the picture above and the table below. `picture`: None is drawn grey, and `problem` says why."""
    width, height = picture.size if picture else view.size or (1, 1)
    scale = LONG_SIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    ground = picture.resize(size, Image.Resampling.LANCZOS) if picture else Image.new("RGB", size, GONE)
    most = None if view.reliability is None else view.reliability.scale
    order = sorted(
        range(len(view.rows)), key=lambda k: (view.rows[k].source is not Source.BASE_BOX, -(view.rows[k].weight or 0.0))
    )
    boxes = []
    for k in order:  # what counts most is on top
        left, top, right, bottom = (v * scale for v in view.rows[k].box)
        boxes.append(Labelled((left, top, right, bottom), str(k + 1), row_colour(view.rows[k], most)))
    canvas = Image.new("RGB", (LONG_SIDE, ground.height), PAPER)  # as wide as the table, so that nothing is enlarged
    canvas.paste(ground, (0, 0))
    table = _draw_table(view, novel, problem)
    sheet = Image.new("RGB", (table.width, canvas.height + table.height), PAPER)
    sheet.paste(draw_boxes(canvas, boxes), (0, 0))
    sheet.paste(table, (0, canvas.height))
    return sheet


def row_colour(row: ViewRow, most: float | None) -> Colour:
    """`most`: the highest weight that there can be; None if weights are not known."""
    if row.source is Source.BASE_BOX:
        return BASE_COLOUR
    part = 1.0 if most is None else min(max((row.weight or 0.0) / most, 0.0), 1.0)
    red, green, blue = (round(weak + (strong - weak) * part) for weak, strong in zip(WEAK, STRONG, strict=True))
    return red, green, blue


def _draw_table(view: CacheView, novel: Collection[str], problem: str) -> Image.Image:
    """What `view_lines` says, in columns: letters are not equally wide here."""
    above, below = _title(view, novel), [*([f"note: {problem}"] if problem else ()), *_foot(view, novel)]
    cells = [[cut_label(cell, WIDEST_COLUMN, SIZE) for cell in row] for row in _cells(view, novel)]
    columns = [
        max(label_font(cell, SIZE).getlength(cell) for cell in column) + GAP for column in zip(*cells, strict=True)
    ]
    width = max(LONG_SIDE, round(sum(columns)) + 2 * MARGIN)
    sheet = Image.new("RGB", (width, LINE * (len(above) + len(cells) + len(below)) + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate([*([line] for line in above), *cells, *([line] for line in below)]):
        left = float(MARGIN)
        for cell, column in zip(row, columns if len(row) > 1 else [width - 2 * MARGIN], strict=True):
            text = cut_label(cell, column, SIZE)
            pen.text((left, MARGIN + LINE * number), text, fill=INK, font=label_font(text, SIZE))
            left += column
    return sheet
