"""The picture of what a cache knows of an image: numbered boxes, and beside them a legend with a line a box. Called by `view_images`.

Base boxes are blue. Proposals are orange: the more a label weighs in training, the stronger the colour and the wider the line. Names stand
in the legend alone, for boxes overlap.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from hdovd.cache.schema import Source
from hdovd.pipelines.cache_tools.view import CacheView, Likeness, ViewRow
from hdovd.pipelines.common.drawing import BASE_COLOUR, Colour
from hdovd.pipelines.common.label_font import cut_label, label_font

STRONG, WEAK = (240, 95, 0), (255, 222, 178)  # of proposals, whatever their class: not the colour of novel ones
INK, DIM, PAPER, RULE, GONE = (25, 25, 28), (105, 105, 112), (255, 255, 255), (225, 225, 230), (120, 120, 124)
LONG_SIDE = 1_000  # of the picture on the sheet, pixels
MARGIN, COLUMN, ENTRY, BAR = 16, 500, 46, 60
MOST_COLUMNS = 4
SIZE, SMALL, TITLE = 16, 13, 19


def draw_view(view: CacheView, picture: Image.Image | None, novel: Collection[str] = (), problem: str = "") -> Image.Image:
    """A sheet with the picture on the left and the legend on the right. `picture`: None is drawn grey, and `problem` says why."""
    width, height = picture.size if picture else view.size or (1, 1)
    scale = LONG_SIDE / max(width, height)
    ground = (picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS) if picture
              else Image.new("RGB", (round(width * scale), round(height * scale)), GONE))
    _draw_boxes(ground, view, scale)
    legend = _Legend(view, novel, (problem, *view.notes) if problem else view.notes)
    columns = min(MOST_COLUMNS, max(1, -(-len(view.rows) * legend.entry // max(ground.height - legend.head, 8 * legend.entry))))
    panel = legend.draw(columns)
    sheet = Image.new("RGB", (ground.width + panel.width, max(ground.height, panel.height)), PAPER)
    sheet.paste(ground, (0, 0))
    sheet.paste(panel, (ground.width, 0))
    return sheet


def row_colour(row: ViewRow, most: float | None) -> Colour:
    """`most`: the highest weight that there can be; None if weights are not known."""
    if row.source is Source.BASE_BOX:
        return BASE_COLOUR
    return _mixed(1.0 if most is None else (row.weight or 0.0) / most)


def _mixed(part: float) -> Colour:
    red, green, blue = (round(weak + (strong - weak) * min(max(part, 0.0), 1.0)) for weak, strong in zip(WEAK, STRONG, strict=True))
    return red, green, blue


def _most(view: CacheView) -> float | None:
    return None if view.reliability is None else view.reliability.scale


def _draw_boxes(ground: Image.Image, view: CacheView, scale: float) -> None:
    pen, most = ImageDraw.Draw(ground), _most(view)
    order = sorted(range(len(view.rows)), key=lambda k: (view.rows[k].source is Source.BASE_BOX, view.rows[k].weight or 0.0))
    for k in order:  # the weakest first: what counts most is on top
        row = view.rows[k]
        box = [v * scale for v in row.box]
        heavy = row.source is Source.BASE_BOX or most is None or (row.weight or 0) > most / 2
        line = 4 if heavy else 2
        pen.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=INK, width=line + 2)
        pen.rectangle(box, outline=row_colour(row, most), width=line)
    taken: list[tuple[float, float, float, float]] = []
    for k in reversed(order):
        row, text = view.rows[k], str(k + 1)
        size = pen.textlength(text, label_font(text, SIZE)) + 10, 20
        place = _free_place([v * scale for v in row.box], size, taken, ground.size)
        taken.append(place)
        _chip(pen, place, text, row_colour(row, most))


def _free_place(box: Sequence[float], size: tuple[float, float], taken: Sequence[tuple[float, float, float, float]],
                within: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where a number goes: a corner of its box, or further along an edge, where no other number is; the first corner if all are taken."""
    wide, high = size
    left, top = min(max(box[0], 0), within[0] - wide), min(max(box[1], 0), within[1] - high)
    right, bottom = max(min(box[2], within[0]) - wide, left), max(min(box[3], within[1]) - high, top)

    def places() -> Iterator[tuple[float, float]]:
        yield from ((left, top), (right, top), (left, bottom), (right, bottom))
        for part in (0.25, 0.5, 0.75):
            x, y = left + part * (right - left), top + part * (bottom - top)
            yield from ((x, top), (left, y), (right, y), (x, bottom))

    for x, y in places():
        if all(x + wide <= a or x >= c or y + high <= b or y >= d for a, b, c, d in taken):
            return x, y, x + wide, y + high
    return left, top, left + wide, top + high


def _chip(pen: ImageDraw.ImageDraw, place: tuple[float, float, float, float], text: str, colour: Colour) -> None:
    pen.rectangle(place, fill=colour, outline=INK)
    ink = PAPER if sum(colour) < 420 else INK
    _write(pen, ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), text, SIZE, ink, anchor="mm")


@dataclass(frozen=True, slots=True)
class _Legend:
    view: CacheView
    novel: Collection[str]
    notes: tuple[str, ...]

    @property
    def entry(self) -> int:
        """Pixels from an entry to the next: one line more where labels are made of several nouns."""
        return ENTRY + 18 * any(len(row.nouns) > 1 for row in self.view.rows)

    @property
    def head(self) -> int:
        """Pixels above the first entry."""
        return MARGIN + 30 + 20 * len(self._subtitles(COLUMN - 2 * MARGIN)) + 12

    def draw(self, columns: int) -> Image.Image:
        rows, view = self.view.rows, self.view
        each = -(-len(rows) // columns)
        inner = columns * COLUMN - 2 * MARGIN
        notes = [line for note in self._foot() for line in _wrapped(note, inner, SMALL)]
        panel = Image.new("RGB", (columns * COLUMN, self.head + each * self.entry + 18 * len(notes) + 2 * MARGIN), PAPER)
        pen = ImageDraw.Draw(panel)
        _write(pen, (MARGIN, MARGIN), f"image {view.image_id}" + (f"   {view.file.name}" if view.file else ""), TITLE, INK)
        for k, line in enumerate(self._subtitles(COLUMN - 2 * MARGIN)):
            _write(pen, (MARGIN, MARGIN + 30 + 20 * k), line, SMALL, DIM)
        for k, row in enumerate(rows):
            self._entry(pen, k + 1, row, MARGIN + k // each * COLUMN, self.head + k % each * self.entry)
        for k, line in enumerate(notes):
            _write(pen, (MARGIN, self.head + each * self.entry + MARGIN + 18 * k), line, SMALL, DIM)
        return panel

    def _entry(self, pen: ImageDraw.ImageDraw, number: int, row: ViewRow, left: int, top: int) -> None:
        colour, most, right = row_colour(row, _most(self.view)), _most(self.view), left + COLUMN - 2 * MARGIN
        base = row.source is Source.BASE_BOX
        _chip(pen, (left, top + 2, left + 30, top + 22), str(number), colour)
        name = self._marked(row.name) if row.name else ("base box" if base else "no noun")
        if len(row.nouns) > 1:
            made_of = "of " + ",  ".join(f"{self._marked(noun.name)} {noun.share:.0%}" for noun in row.nouns)
            _write(pen, (left + 40, top + 42), cut_label(made_of, right - left - 40, SMALL), SMALL, DIM)
        if row.weight is not None and most:
            pen.rectangle((right - BAR, top + 6, right, top + 18), outline=RULE, fill=RULE)
            pen.rectangle((right - BAR, top + 6, right - BAR + BAR * row.weight / most, top + 18), fill=colour, outline=INK)
        facts = "base class" if base else "" if row.weight is None else f"weight {row.weight:.2f}"
        edge = right - BAR - 10 if row.weight is not None else right
        _write(pen, (edge, top + 12), facts, SMALL, DIM if base else INK, anchor="rm")
        cosine = "" if row.cosine is None else f"cos {row.cosine:.2f}"
        _write(pen, (right - BAR - 90, top + 12), cosine, SMALL, INK, anchor="rm")
        _write(pen, (left + 40, top + 3), cut_label(name, right - BAR - 150 - left - 40, SIZE), SIZE, INK)
        nearest = f"like {self._names(row.nearest)}" if row.nearest else "no embedding" if row.cosine is None else ""
        _write(pen, (left + 40, top + 24), cut_label(nearest, right - left - 40, SMALL), SMALL, DIM)

    def _subtitles(self, width: int) -> list[str]:
        view = self.view
        lines = [f"the whole picture is like {self._names(view.nearest)}"] if view.nearest else []
        if view.reliability:
            lines.append(f"weight = {view.reliability.scale:.3g} sigmoid((cos - {view.reliability.centre:.3g}) / "
                         f"{view.reliability.width:.3g}), {view.reliability.source}")
        return [part for line in lines for part in _wrapped(line, width, SMALL)]

    def _foot(self) -> list[str]:
        shown = [name for row in self.view.rows for name in (row.name, *(n.name for n in (*row.nouns, *row.nearest)))]
        star = ["* a novel class of the protocol"] if any(name in self.novel for name in shown) else []
        return star + [f"note: {note}" for note in self.notes]

    def _marked(self, name: str) -> str:
        return f"{name}*" if name in self.novel else name

    def _names(self, found: Sequence[Likeness]) -> str:
        return ",  ".join(f"{self._marked(one.name)} {one.cosine:.2f}" for one in found)


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Colour, anchor: str | None = None) -> None:
    pen.text(place, text, fill=colour, font=label_font(text, size), anchor=anchor)


def _wrapped(text: str, width: float, size: int) -> list[str]:
    font, lines = label_font(text, size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [cut_label(line, width, size) for line in lines]
