"""What the page is answered: detections, hits, and pictures of the cache. For one thread, and for people who may send
anything.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from PIL import Image

from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.picture_header import open_picture, told
from hdovd.core.text_files import checked_name
from hdovd.pipelines.common.images import decode, read_image
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.search.config import BoxSource, SearchConfig, parse_box
from hdovd.pipelines.search.hit import Hit
from hdovd.pipelines.search.page import CROP_SIDE, PICTURE_SIDE, cut_out, data_of
from hdovd.pipelines.search.search import Searched, found, opened
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.teachers.prompts import folded

KINDS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # Pillow starts a program for one of the others
MOST_NAMES, MOST_HITS = 500, 100
PICTURE = "the picture"  # what an upload is called, whatever its sender calls it


class Answers:
    """A run's detector, a cache to search, or both."""

    detector: Detector | None = None
    searched: Searched | None = None

    def __init__(self, config: ServeConfig) -> None:
        """Loads what is served. Raises HdovdError."""
        self._config = config
        self._looks_for: object = None
        if config.run is not None:
            self.detector = Detector.from_run(
                config.run,
                weights=config.weights,
                device=config.device,
                clip=config.clip,
                pretrained=config.pretrained,
                trust=config.trust,
            )
        if config.cache is not None:
            self._search = SearchConfig(
                cache=config.cache,
                features=config.features,
                data=config.data,
                queries=("-",),
                clip=config.clip,
                pretrained=config.pretrained,
                device=config.device,
            )
            self.searched = self._opened()
        self._split = self.searched.split if self.searched else None
        self._images = {image.id: image for image in (self._split.images if self._split else ())}

    def _opened(self) -> Searched:
        try:
            return opened(self._search, pictures=True)
        except HdovdError as error:
            if self._search.data is not None:
                raise
            searched = opened(self._search)  # if it is the cache that is wrong, this raises
            log(f"note: boxes of the cache are shown without pictures: {error}")
            return searched

    def detect(
        self, picture: bytes, names: str, examples: Sequence[tuple[str, bytes]], mix: float, alone: bool
    ) -> dict[str, Any]:
        """What is in a picture. names: see `listed`; those of the run if there are neither names nor examples, which
        are crops with their class. Raises HdovdError.
        """
        if self.detector is None:
            raise HdovdError("no run is served here: hdovd serve --run RUN")
        for data in (picture, *(crop for _, crop in examples)):
            self._require_fit(data)
        self._look_for(self.detector, listed(names), examples, mix, alone)
        decoded, novel = decode(picture), self.detector.is_novel.tolist()
        one = self.detector.find([decoded], self.detector.recipe.inference.score_threshold)[0]
        rows = zip(one.names, one.labels.tolist(), one.scores.tolist(), one.boxes.tolist(), strict=True)
        return {
            "width": decoded.width,
            "height": decoded.height,
            "names": self.detector.names,
            "detections": [
                {"name": name, "novel": novel[label], "score": score, "box": box} for name, label, score, box in rows
            ],
        }

    def _look_for(
        self, detector: Detector, names: list[str], examples: Sequence[tuple[str, bytes]], mix: float, alone: bool
    ) -> None:
        """As asked for, unless it does so already."""
        asked = names, [(name, hashlib.sha256(crop).digest()) for name, crop in examples], mix, alone
        if asked == self._looks_for:
            return
        self._looks_for = None  # if it fails
        shown: dict[str, list[bytes]] = {}
        for name, crop in examples:
            shown.setdefault(name, []).append(crop)
        if shown:
            detector.set_examples(shown, names=names, mix=mix, alone=alone)
        else:
            detector.set_classes(names or detector.protocol.names, alone=alone)
        self._looks_for = asked

    def search(
        self, words: str, unlike: str, like: str, picture: bytes | None, box: str, source: str, count: int
    ) -> dict[str, Any]:
        """The hits for parts that add up, as `hdovd search` has them, with their crops. Raises HdovdError."""
        if self.searched is None:
            raise HdovdError("no cache is served here: hdovd serve --cache CACHE")
        if picture is not None:
            self._require_fit(picture)
        asked = replace(
            self._search,
            queries=tuple(listed(words)),
            not_=tuple(listed(unlike)),
            like=tuple(listed(like)),
            image=() if picture is None else (PICTURE,),
            box=parse_box(box) if box else None,
            source=BoxSource(source) if source in [*BoxSource] else None,
            count=max(1, min(count, MOST_HITS)),
        )
        hits = found(asked, self.searched, {} if picture is None else {PICTURE: picture})
        return {"hits": [asdict(hit) | {"crop": self._crop(hit)} for hit in hits]}

    def whole(self, image_id: int) -> dict[str, Any]:
        """A picture of the cache, as a data: address. Raises HdovdError."""
        picture = self._picture(image_id)
        return {"picture": data_of(picture, PICTURE_SIDE), "width": picture.width, "height": picture.height}

    def _crop(self, hit: Hit) -> str | None:
        """As a data: address; None if the picture is not there, or cannot be read."""
        try:
            return data_of(cut_out(self._picture(hit.image_id), hit.box), CROP_SIDE)
        except HdovdError:
            return None

    def _picture(self, image_id: int) -> Image.Image:
        if self._split is None or image_id not in self._images:
            raise HdovdError(f"there is no picture of image {image_id} here")
        image = self._images[image_id]
        return read_image(self._split.path(image), image.width, image.height, exif=self._split.exif)

    def _require_fit(self, data: bytes) -> None:
        """Raises HdovdError for what is no picture, or larger than is decoded; nothing is decoded here."""
        with told(PICTURE), open_picture(io.BytesIO(data)) as file:
            if file.format not in KINDS:
                raise HdovdError(f"is {file.format}, expected one of {', '.join(KINDS)}")
            if file.width * file.height > 1e6 * self._config.max_megapixels:
                raise HdovdError(
                    f"has {file.width}x{file.height} pixels, more than the {self._config.max_megapixels:g} million "
                    "that are taken here: make it smaller"
                )


def listed(text: str) -> list[str]:
    """Names or words with commas or lines between them, each once. Raises HdovdError for what cannot be printed, and
    for too many.
    """
    parts = [" ".join(part.split()) for part in re.split(r"[,\r\n]", text)]
    found = {folded(part): checked_name(part, "a name") for part in parts if part}
    if len(found) > MOST_NAMES:
        raise HdovdError(f"{len(found)} names, {MOST_NAMES} at most")
    return [*found.values()]


def without_paths(error: str) -> str:
    """An error as others than the server's user may read it."""
    text = re.sub(r"'[^'\n]*/[^'\n]*'|\S*/\S*", "(a place on the server)", error)
    if text != error:
        log(f"told without paths: {error}")
    return text
