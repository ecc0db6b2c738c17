"""The page of a search: a crop a hit, and on a click its picture with the box. One HTML file that needs nothing
else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.version import __version__
from hdovd.data.coco import Split
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.charts import picture_data
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.pages import page
from hdovd.pipelines.search.config import Box
from hdovd.pipelines.search.hit import Hit

CROP_SIDE, PICTURE_SIDE = 200, 900  # pixels at most


def write_page(file: Path, title: str, hits: Sequence[Hit], split: Split) -> None:
    """Write the hits with their crops. A picture that cannot be read is said in its place."""
    images, pictures, cards = {image.id: image for image in split.images}, dict[int, dict[str, Any]](), []
    for hit in hits:
        image, crop, problem = images[hit.image_id], "", ""
        try:
            picture = read_image(split.path(image), image.width, image.height, exif=split.exif)
        except HdovdError as error:
            problem = str(error)
        else:
            crop = data_of(cut_out(picture, hit.box), CROP_SIDE)
            pictures[image.id] = {"data": data_of(picture, PICTURE_SIDE), "image": image}
        cards.append({"hit": hit, "crop": crop, "problem": problem})
    context = {"title": title, "cards": cards, "pictures": pictures, "version": __version__}
    write_text(file, page("search.html", context))
    log(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB, one file that needs nothing else)")


def cut_out(picture: Image.Image, box: Box) -> Image.Image:
    """A box of a picture, xyxy, a pixel at least."""
    left, top, right, bottom = map(round, box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def data_of(picture: Image.Image, side: int) -> str:
    """A picture as a data: address, reduced to `side` pixels at most."""
    small = ImageOps.contain(picture, (side, side)) if max(picture.size) > side else picture
    return picture_data(small, quality=82)
