"""What a search finds, and the forms that it is given in: a table, and a page of crops."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.pages import small_picture_data, write_page
from hdovd.pipelines.runs.listing import table_lines
from hdovd.pipelines.search.config import Box, SearchConfig

CROP_SIDE, PICTURE_SIDE = 200, 900  # pixels at most
HEAD = ("#", "cosine", "image:row", "source", "name", "score", "box: left, top, right, bottom", "other", "its cosine")
NUMBERS = {"#", "cosine", "its cosine", "score"}


@dataclass(frozen=True, slots=True)
class Hit:
    """A box that was found. `row`: its number within its image, from 0; None: the picture itself. `box`: xyxy, pixels
    of the original image. `name`: class or noun; empty if it has none, or the annotations were not read. `cosine`: with
    the query, the text of its own class, the mean of its class, or `other`. `other`: the class that it speaks for, and
    `other_cosine` with its text; or the other one of a pair, as `place`.
    """

    image_id: int
    row: int | None
    box: Box
    source: str
    name: str
    score: float | None
    cosine: float
    other: str = ""
    other_cosine: float | None = None

    @property
    def place(self) -> str:
        """What `--like` takes; of a picture its id."""
        return str(self.image_id) if self.row is None else f"{self.image_id}:{self.row}"


def write_results(file: Path, hits: Sequence[Hit]) -> None:
    """COCO results form, with the names that `hdovd export-labels` takes."""
    found = []
    for hit in hits:
        left, top, right, bottom = hit.box
        about = {"image_id": hit.image_id, "category_id": 1, "name": hit.name, "other": hit.other}
        found.append(about | {"bbox": [left, top, right - left, bottom - top], "score": hit.cosine})
    write_text(file, json.dumps(found))
    log(f"wrote {file}")


def search_lines(hits: Sequence[Hit], config: SearchConfig) -> list[str]:
    """The hits as a table for a terminal."""
    rows = []
    for number, hit in enumerate(hits, 1):
        score, other = (f"{value:.3f}" if value is not None else "-" for value in (hit.score, hit.other_cosine))
        box, name = ", ".join(f"{value:.0f}" for value in hit.box), hit.name or "-"
        rows.append((f"{number}", f"{hit.cosine:.3f}", hit.place, hit.source, name, score, box, hit.other, other))
    columns = len(HEAD) - (not config.suspicious) - (config.is_query or config.untypical is not None)
    lines = table_lines(HEAD[:columns], [row[:columns] for row in rows], NUMBERS)
    return lines if rows else [f"nothing found: {config.question}"]


def write_crops(
    file: Path, title: str, hits: Sequence[Hit], images: Mapping[int, ImageBoxes], read: Callable[[int], Image.Image]
) -> None:
    """Write the hits with their crops. `images`, `read`: the picture of an id; one that cannot be read is said in its
    place.
    """
    pictures, cards = dict[int, dict[str, Any]](), []
    for hit in hits:
        crop = problem = ""
        try:
            picture = read(hit.image_id)
        except HdovdError as error:
            problem = str(error)
        else:
            crop = crop_of(picture, hit)
            pictures[hit.image_id] = {"data": small_picture_data(picture, PICTURE_SIDE), "image": images[hit.image_id]}
        cards.append({"hit": hit, "crop": crop, "problem": problem})
    write_page(file, "search.html", {"title": title, "cards": cards, "pictures": pictures})


def crop_of(picture: Image.Image, hit: Hit) -> str:
    """The hit's box of its picture, a pixel at least, as a data: address."""
    left, top, right, bottom = map(round, hit.box)
    return small_picture_data(picture.crop((left, top, max(right, left + 1), max(bottom, top + 1))), CROP_SIDE)
