"""`hdovd cache view`: a picture and a table for each image asked for, of what the cache knows of its boxes.

Called by the command line. `cache_view` gathers it, `view_picture` draws it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Source
from hdovd.core.errors import HdovdError
from hdovd.pipelines.cache_tools.config import ViewConfig
from hdovd.pipelines.cache_tools.view import CacheView, Likeness, ViewRow, find_reliability, gather_view
from hdovd.pipelines.cache_tools.view_picture import draw_view
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.extraction.source import CacheWithData, with_data

NEAR_IDS = 6  # named where an image is not there


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
        log(f"weight = {reliability.scale:.4g} * sigmoid((cosine - {reliability.centre:.4g}) / {reliability.width:.4g}), by "
            f"{reliability.source}")
    files = []
    for image_id in ids:
        image = found.images[image_id]
        view = gather_view(cache, image_id, image, names=found.protocol.names, file=found.split.path(image), reliability=reliability)
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
            raise HdovdError(f"--image {word}: expected an image id, such as {there[0]}, or random:N; several with commas between")
        elif int(word) not in known:
            raise HdovdError(_not_there(cache, int(word), there))
        else:
            ids.append(int(word))
    return list(dict.fromkeys(ids))


def view_lines(view: CacheView, novel: Collection[str] = ()) -> list[str]:
    """The table of an image, for a terminal. Names of `novel` are marked with a star."""
    count = {source: sum(row.source is source for row in view.rows) for source in Source}
    lines = [f"image {view.image_id}" + (f", {view.file.name}, {view.size[0]}x{view.size[1]}" if view.file and view.size else "")
             + f": {count[Source.BASE_BOX]} base boxes, {count[Source.PROPOSAL]} proposals"]
    if view.nearest:
        lines.append(f"the whole picture is most like: {_names(view.nearest, novel)}")
    if view.rows:
        head = ("", "", "name", "cosine", "weight", "score", "box: left, top, right, bottom", "nearest class names")
        cells = [head, *(_cells(number, row, novel) for number, row in enumerate(view.rows, 1))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = (0, 3, 4, 5)
        lines += ["  ".join(cell.rjust(width) if place in right else cell.ljust(width)
                            for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    if any("*" in line for line in lines):
        lines.append("* a novel class of the protocol")
    return lines + [f"note: {note}" for note in view.notes]


def _cells(number: int, row: ViewRow, novel: Collection[str]) -> tuple[str, ...]:
    base = row.source is Source.BASE_BOX
    if len(row.nouns) > 1:
        name = ", ".join(f"{marked(noun.name, novel)} {noun.share:.0%}" for noun in row.nouns)
    else:
        name = marked(row.name, novel) if row.name else "-"
    return (str(number), "base" if base else "proposal", name, _number(row.cosine), _number(row.weight), _number(row.score),
            ", ".join(f"{v:.0f}" for v in row.box), _names(row.nearest, novel) or "-")


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
    why = (f"it was skipped: {skipped[0]}" if skipped
           else "only images with a base box are in a cache" if len(there) > 1 else "")
    near = sorted(sorted(there, key=lambda other: abs(other - image_id))[:NEAR_IDS])
    return (f"{cache.url} does not have image {image_id} ({why}). It has {len(there):,d} images, ids {min(there)} to {max(there)}; the "
            f"nearest ids are {', '.join(map(str, near))}. --image random shows any")


def marked(name: str, novel: Collection[str]) -> str:
    """The name, with a star if it is a novel class's."""
    return f"{name}*" if name in novel else name


def _names(found: Sequence[Likeness], novel: Collection[str]) -> str:
    return ", ".join(f"{marked(one.name, novel)} {one.cosine:.2f}" for one in found)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
