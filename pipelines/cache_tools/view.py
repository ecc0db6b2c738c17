"""`hdovd cache view`: what a cache knows of each image asked for, as a picture and a table. No CLIP is needed.

A box has its nouns, cosines, weight and nearest class names. In the picture base boxes are blue and proposals orange:
the more a label weighs in training, the stronger the colour. The numbers of the boxes are those of the table, which
stands below it. D embedding size.
"""

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from hdovd.cache import Level, Source
from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError, log, quiet, shorten
from hdovd.data import ImageBoxes
from hdovd.pipelines.cache_tools.config import ViewConfig
from hdovd.pipelines.calibration.values import VALUES, origin_of, with_reliability
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.drawing import BASE_COLOUR, Colour, Labelled, cut_label, draw_boxes, label_font
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.runs import table_lines

NEAREST = 3  # class names a box


@dataclass(frozen=True, slots=True)
class Reliability:
    """The weight of a pseudo label by its cosine (METHOD section 2). `source`: where the values are from, in words."""

    centre: float
    width: float
    scale: float
    source: str

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Reliability | None":
        """What a run's record says, or `with_reliability` for one; None where there are no weights."""
        found = record.get("reliability")
        return cls(**{name: float(found[name]) for name in VALUES}, source=str(found["source"])) if found else None

    def weight(self, cosine: float) -> float:
        """In 0..scale."""
        return float(self.scale / (1 + np.exp(-(cosine - self.centre) / self.width)))


@dataclass(frozen=True, slots=True)
class Likeness:
    """A name and the cosine of its text embedding with a crop's. `share`: its part in a label that is made of several
    nouns.
    """

    name: str
    cosine: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ViewRow:
    """A box of an image; all names are what the cache calls them.

    box: xyxy, pixels of the original image. `class_name`: of a base box, None if the annotations do not say. `score`:
    of a proposal. `nouns`: what a proposal's label is made of, best first; empty without label. `cosine`: of the crop's
    embedding with the label's text embedding u, or with the class of a base box; None if there is none. `weight`: of a
    label in training; None if that is not known. `nearest`: the class names that the crop is most like; empty if the
    cache has no class names, or no embedding of this box.
    """

    box: tuple[float, float, float, float]
    source: Source
    class_name: str | None
    annotation_id: int | None
    score: float | None
    nouns: tuple[Likeness, ...]
    cosine: float | None
    weight: float | None
    nearest: tuple[Likeness, ...]

    @property
    def name(self) -> str:
        """What it is called in the cache: its class or its best noun; empty if it is not called anything."""
        return (self.class_name or "") if self.source is Source.BASE_BOX else (self.nouns[0].name if self.nouns else "")


@dataclass(frozen=True, slots=True)
class CacheView:
    """An image as a cache has it: base boxes first, then proposals best first.

    `file` and `size` (width, height): None if no annotations were given. `nearest`: of the whole picture's embedding.
    `notes`: what is missing, and why, in words.
    """

    image_id: int
    file: Path | None
    size: tuple[int, int] | None
    rows: tuple[ViewRow, ...]
    nearest: tuple[Likeness, ...]
    reliability: Reliability | None
    notes: tuple[str, ...]


def find_reliability(
    cache: FeatureCache, calibration: Path | None = None, recipe: Recipe | None = None, base: Sequence[str] = ()
) -> Reliability | None:
    """The values of a calibration, or of a recipe, or (neither given) those known for the cache's CLIP; None if none
    are known.

    `base`: the classes that a calibration may be fitted on. Raises HdovdError for a calibration of other features, and
    for a recipe that says "auto" with a CLIP that is not known.
    """
    if recipe is None:
        recipe = load_recipe("ov-coco-faster-rcnn-r50")  # whose values are "auto"
        origin = origin_of(cache)
        if calibration is None and origin.known() is None and not origin.fitted:
            return None
    with quiet():
        return Reliability.recorded(with_reliability(recipe, lambda: origin_of(cache), calibration, base)[2])


def gather_view(
    cache: FeatureCache,
    image_id: int,
    image: ImageBoxes | None = None,
    *,
    names: Sequence[str] = (),
    file: Path | None = None,
    reliability: Reliability | None = None,
) -> CacheView:
    """What `cache` has of an image.

    `image`: the same image in the annotations, whose labels count into `names` (a protocol's); None: base boxes have no
    class name. `file`: its picture, only handed on. Raises HdovdError if the cache does not have the image.
    """
    levels, failed, rows = cache.levels(), cache.failed(), cache.instances(image_id)
    crops = normalised_rows(rows.embedding)
    classes = cache.names(Level.CLASS) if Level.CLASS in levels else []
    texts = normalised_rows(cache.embeddings(Level.CLASS)) if classes else np.zeros((0, crops.shape[1]), np.float32)
    annotated = () if image is None else zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
    own = {number: names[label] for number, label in annotated}
    base, found = rows.source == Source.BASE_BOX, []
    for row, (nouns, cosine) in enumerate(_labels(cache, rows, crops)):
        likeness = texts @ crops[row] if crops[row].any() else np.zeros(0, np.float32)
        number = int(rows.annotation_id[row]) if base[row] else None
        class_name = None if number is None else own.get(number)
        if class_name in classes and len(likeness):
            cosine = float(likeness[classes.index(class_name)])
        found.append(
            ViewRow(
                tuple(rows.box[row].tolist()),
                Source(rows.source[row]),
                class_name,
                number,
                None if base[row] else float(rows.score[row]),
                nouns,
                cosine,
                reliability.weight(cosine) if reliability and cosine is not None and not base[row] else None,
                _nearest(classes, likeness),
            )
        )
    unread = [f"the extraction could not read it: {failed[image_id]}"] if image_id in failed else []
    unknown = [number for number in rows.annotation_id[base].tolist() if number not in own]
    if image is not None and unknown:
        unread.append(
            f"the annotations do not have these of the cache: {shorten(unknown)}; is this the data that it was made "
            f"from?"
        )
    whole = normalised_rows(cache.image_embedding(image_id)[None])[0] if Level.IMAGE in levels else np.zeros(0)
    return CacheView(
        image_id,
        file,
        None if image is None else (image.width, image.height),
        tuple(found),
        _nearest(classes, texts @ whole) if whole.any() else (),
        reliability,
        (*unread, *_missing(levels, rows, reliability)),
    )


def _labels(
    cache: FeatureCache, rows: InstanceRows, crops: np.ndarray
) -> list[tuple[tuple[Likeness, ...], float | None]]:
    """Of each row the nouns that its label is made of, and the cosine of the crop and u, their normalised weighted
    mean.
    """
    if Level.NOUN not in cache.levels():
        return [((), None)] * len(crops)
    names, texts = cache.names(Level.NOUN), normalised_rows(cache.embeddings(Level.NOUN))
    nouns, shares = rows.noun[:, None], np.ones((len(crops), 1), np.float32)
    if rows.top_noun.shape[1]:
        nouns, shares = rows.top_noun, rows.top_weight
    found = list[tuple[tuple[Likeness, ...], float | None]]()
    for crop, row_nouns, row_shares in zip(crops, nouns.tolist(), shares.tolist(), strict=True):
        made_of = [pair for pair in zip(row_nouns, row_shares, strict=True) if pair[0] >= 0]
        u = np.sum([texts[noun] * share for noun, share in made_of], axis=0)
        cosine = float(u @ crop / max(np.linalg.norm(u), 1e-12)) if made_of else None
        label = tuple(Likeness(names[noun], float(texts[noun] @ crop), share) for noun, share in made_of)
        found.append((label, cosine))
    return found


def _missing(levels: Collection[Level], rows: InstanceRows, reliability: Reliability | None) -> list[str]:
    """What the cache lacks, and what would give it."""
    proposals = rows.source == Source.PROPOSAL
    without, named = int((rows.noun[proposals] < 0).sum()), {Level.PSEUDO_LABEL, Level.NOUN} <= set(levels)
    notes = {
        "the cache has no proposals of this image": not proposals.any(),
        "the cache has no nouns, so proposals have no label: extract-clip --nouns or --vocabulary": (
            proposals.any() and not named
        ),
        f"{without} of {int(proposals.sum())} proposals have no noun: they are most like a background, the image "
        "offers none, or its picture was not read": named and without,
        "no weights: no values are known for this CLIP and these prompts; give --calibration FILE (hdovd calibrate), "
        "or a --recipe that has some": Level.PSEUDO_LABEL in levels and reliability is None,
        "the cache has no class names, so there are no nearest classes": Level.CLASS not in levels,
        "the cache has no image level": Level.IMAGE not in levels,
    }
    return [note for note, holds in notes.items() if holds]


def _nearest(names: Sequence[str], cosines: np.ndarray) -> tuple[Likeness, ...]:
    return tuple(Likeness(names[k], float(cosines[k])) for k in np.argsort(-cosines, kind="stable")[:NEAREST].tolist())


def marked(name: str, novel: Collection[str]) -> str:
    """The name, with a star if it is a novel class's."""
    return f"{name}*" if name in novel else name


def names_and_cosines(found: Sequence[Likeness], novel: Collection[str]) -> str:
    """Names with their cosines, best first."""
    return ", ".join(f"{marked(one.name, novel)} {one.cosine:.2f}" for one in found)


STRONG, WEAK = (240, 95, 0), (255, 222, 178)  # of proposals, whatever their class: not the colour of novel ones
INK, PAPER, GONE = (25, 25, 28), (255, 255, 255), (120, 120, 124)
LONG_SIDE = 1_000  # of the picture on the sheet, pixels
WIDEST_COLUMN = 420
MARGIN, GAP, LINE, SIZE = 16, 18, 22, 14


def view_images(config: ViewConfig) -> list[Path]:
    """Draw the images and print their tables; returns the files written. Raises HdovdError for bad input."""
    config.check()
    cache = FeatureCache(config.cache, config.features)
    ids = chosen_images(cache, config.images, config.seed)
    if config.out.suffix and len(ids) > 1:
        raise HdovdError(f"--out {config.out} is one file, and {len(ids)} images are asked for: give a folder")
    split, protocol = config.load_for(cache)
    reliability = find_reliability(cache, config.calibration, config.recipe, protocol.base)
    if reliability is not None:
        log(
            f"weight = {reliability.scale:.4g} * sigmoid((cosine - {reliability.centre:.4g}) / "
            f"{reliability.width:.4g}), by {reliability.source}"
        )
    images, files = {image.id: image for image in split.images}, []
    for image in (images[image_id] for image_id in ids):
        path, picture = split.path(image), None
        view = gather_view(cache, image.id, image, names=protocol.names, file=path, reliability=reliability)
        try:
            picture = read_image(path, image.width, image.height, exif=split.exif)
        except HdovdError as error:  # the extraction could not read it either: its boxes are still to be seen
            view = replace(view, notes=(*view.notes, f"the picture cannot be read: {error}"))
        log(*view_lines(view, protocol.novel))
        files.append(config.out if config.out.suffix else config.out / f"{image.id}.png")
        write_picture(files[-1], draw_view(view, picture, protocol.novel), "PNG")
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
        if drawn := re.fullmatch(r"random(?::(\d+))?", word):
            ids += random.Random(seed).sample(there, min(int(drawn[1] or 1), len(there)))
        elif not re.fullmatch(r"-?\d+", word):
            raise HdovdError(
                f"--image {word}: expected an image id, such as {there[0]}, or random:N; several with commas between"
            )
        elif int(word) not in known:
            skipped = [why for why, ids in cache.set.skipped.items() if why.startswith("image") and int(word) in ids]
            why = f"it was skipped: {skipped[0]}" if skipped else "only images with a base box are in a cache"
            raise HdovdError(
                f"{cache.url} does not have image {word} ({why}). It has {len(there):,d} images, "
                f"ids {min(there)} to {max(there)}; --image random shows any"
            )
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
        nouns = [f"{marked(noun.name, novel)} {noun.share:.0%}" for noun in row.nouns]
        cells.append(
            (
                str(number),
                "base" if row.source is Source.BASE_BOX else "proposal",
                ", ".join(nouns) if len(nouns) > 1 else marked(row.name, novel) or "-",
                *("-" if value is None else f"{value:.2f}" for value in (row.cosine, row.weight, row.score)),
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


def draw_view(view: CacheView, picture: Image.Image | None, novel: Collection[str] = ()) -> Image.Image:
    """A sheet with the picture above and the table below. `picture`: None is drawn grey."""
    width, height = picture.size if picture else view.size or (1, 1)
    scale = LONG_SIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    most = None if view.reliability is None else view.reliability.scale
    boxes = []
    for k, row in sorted(  # what counts most is on top
        enumerate(view.rows, 1), key=lambda one: (one[1].source is not Source.BASE_BOX, -(one[1].weight or 0.0))
    ):
        left, top, right, bottom = (v * scale for v in row.box)
        boxes.append(Labelled((left, top, right, bottom), str(k), row_colour(row, most)))
    canvas = Image.new("RGB", (LONG_SIDE, size[1]), PAPER)  # as wide as the table, so that nothing is enlarged
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS) if picture else GONE, (0, 0, *size))
    sheet = ImageOps.expand(_draw_table(view, novel), (0, canvas.height, 0, 0), PAPER)  # above the table
    sheet.paste(draw_boxes(canvas, boxes), (0, 0))
    return sheet


def row_colour(row: ViewRow, most: float | None) -> Colour:
    """`most`: the highest weight that there can be; None if weights are not known."""
    if row.source is Source.BASE_BOX:
        return BASE_COLOUR
    part = 1.0 if most is None else min(max((row.weight or 0.0) / most, 0.0), 1.0)
    red, green, blue = (round(weak + (strong - weak) * part) for weak, strong in zip(WEAK, STRONG, strict=True))
    return red, green, blue


def _draw_table(view: CacheView, novel: Collection[str]) -> Image.Image:
    """What `view_lines` says, in columns: letters are not equally wide here."""
    cells = [[cut_label(cell, WIDEST_COLUMN, SIZE) for cell in row] for row in _cells(view, novel)]
    columns = [
        max(label_font(cell, SIZE).getlength(cell) for cell in column) + GAP for column in zip(*cells, strict=True)
    ]
    lefts = [*accumulate(columns, initial=float(MARGIN))]
    rows = [[line] for line in _title(view, novel)] + cells + [[line] for line in _foot(view, novel)]
    sheet = Image.new("RGB", (max(LONG_SIDE, round(lefts[-1]) + MARGIN), LINE * len(rows) + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        for left, cell in zip(lefts, row, strict=False):
            text = cut_label(cell, sheet.width - MARGIN - left, SIZE)
            pen.text((left, MARGIN + LINE * number), text, fill=INK, font=label_font(text, SIZE))
    return sheet
