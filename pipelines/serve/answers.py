"""What a page is answered: detections, hits, and pictures of the cache.

A question is a form: `texts` and `files`, of each field the values that were sent, whoever sent them. Files are
pictures that `fitting` let pass. One thread asks.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import unquote

from hdovd.core.errors import HdovdError
from hdovd.core.picture_header import open_picture, told
from hdovd.core.text_files import checked_name
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.common.pages import small_picture_data
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.runs.config import DEFAULT_MIX
from hdovd.pipelines.search.config import BoxSource, SearchConfig, parse_box
from hdovd.pipelines.search.results import PICTURE_SIDE, Hit, crop_of
from hdovd.pipelines.search.search import found, opened
from hdovd.pipelines.serve.config import ServeConfig
from hdovd.pipelines.teachers.prompts import folded

KINDS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # for one of the others Pillow starts a program
MOST_HITS = 100
PICTURE = "the picture"  # what an upload is called, whatever its sender calls it
EXAMPLE = "example:"  # begins the fields of examples; what follows is the class, percent-encoded
Texts = Mapping[str, Sequence[str]]
Files = Mapping[str, Sequence[bytes]]


class Finding:
    """Finds things in pictures: of a run, by name or by example."""

    def __init__(self, config: ServeConfig) -> None:
        """Loads the run. Raises HdovdError."""
        self.detector = Detector.from_run(
            config.run or "", device=config.device, clip=config.clip, pretrained=config.pretrained, trust=config.trust
        )
        self._asked: object = None

    def answer(self, texts: Texts, files: Files) -> dict[str, Any]:
        """What is in `picture`: of `names`, of the classes of examples, or if there are neither of the run's classes;
        mix, alone: as of `Detector.set_examples`. Raises HdovdError.
        """
        detector, names, alone = self.detector, listed(texts, "names"), bool(texts.get("alone"))
        shown = {unquote(name[len(EXAMPLE) :]): crops for name, crops in files.items() if name.startswith(EXAMPLE)}
        if "picture" not in files:
            raise HdovdError("no picture was sent")
        if strange := [name for name in texts if name.startswith(EXAMPLE)]:
            raise HdovdError(f"{strange[0]}: expected a picture, found text")
        if (asked := (names, shown, mix := one(texts, "mix", float, DEFAULT_MIX), alone)) != self._asked:
            if shown:
                detector.set_examples(shown, names=names, mix=mix, alone=alone)
            else:
                detector.set_classes(names or detector.protocol.names, alone=alone)
            self._asked = asked
        picture, novel = decode(files["picture"][0]), detector.is_novel.tolist()
        best = detector.find([picture], detector.recipe.inference.score_threshold)[0]
        rows = zip(best.names, best.labels.tolist(), best.scores.tolist(), best.boxes.tolist(), strict=True)
        return {
            "width": picture.width,
            "height": picture.height,
            "names": detector.names,
            "detections": [
                {"name": name, "novel": novel[label], "score": score, "box": box} for name, label, score, box in rows
            ],
        }


class Searching:
    """Finds boxes of a cache."""

    def __init__(self, config: ServeConfig) -> None:
        """Opens the cache, and the annotations, which say where its pictures are. Raises HdovdError."""
        self._config = SearchConfig(
            cache=config.cache or "",
            features=config.features,
            data=config.data,
            queries=("-",),
            clip=config.clip,
            pretrained=config.pretrained,
            device=config.device,
        )
        self._searched = opened(self._config, pictures=True)

    def answer(self, texts: Texts, files: Files) -> dict[str, Any]:
        """The hits for the parts of a query, and their crops: words, unlike, like, and `picture` or a `box` of it;
        source, count. Raises HdovdError.
        """
        pictures = {PICTURE: files["picture"][0]} if "picture" in files else {}
        if not pictures and not any("".join(texts.get(name, ())).strip() for name in ("words", "unlike", "like")):
            raise HdovdError("nothing to search for: say words, or draw a box on a picture")
        asked = replace(
            self._config,
            queries=tuple(listed(texts, "words")),
            not_=tuple(listed(texts, "unlike")),
            like=tuple(listed(texts, "like")),
            image=tuple(pictures),
            box=one(texts, "box", parse_box, None),
            source=one(texts, "source", BoxSource, None),
            count=max(1, min(one(texts, "count", int, 20), MOST_HITS)),
        )
        hits = found(asked, self._searched, pictures)
        return {"hits": [asdict(hit) | {"crop": self._crop(hit)} for hit in hits]}

    def picture(self, image_id: int) -> dict[str, Any]:
        """A picture of the cache, as a data: address. Raises HdovdError."""
        picture = self._searched.picture(image_id)
        return {"picture": small_picture_data(picture, PICTURE_SIDE), "width": picture.width, "height": picture.height}

    def _crop(self, hit: Hit) -> str | None:
        """As a data: address; None for a picture that cannot be read."""
        try:
            return crop_of(self._searched.picture(hit.image_id), hit)
        except HdovdError:
            return None


def fitting(data: bytes, max_megapixels: float) -> bytes:
    """The same. Raises HdovdError for what is no picture, or larger than is decoded; nothing is decoded here."""
    with told(PICTURE), open_picture(io.BytesIO(data)) as file:
        if file.format not in KINDS:
            raise HdovdError(f"is {file.format}, expected one of {', '.join(KINDS)}")
        if file.width * file.height > 1e6 * max_megapixels:
            most = f"{max_megapixels:g} million that are taken here"
            raise HdovdError(f"has {file.width}x{file.height} pixels, more than the {most}: make it smaller")
    return data


def one(texts: Texts, name: str, kind: Callable[[str], Any], default: Any) -> Any:
    """A field's value, or the default if it is empty. Raises HdovdError."""
    try:
        return kind(texts[name][0]) if "".join(texts.get(name, ())) else default
    except ValueError:
        raise HdovdError(f"{name}: {texts[name][0]!r} is not what was expected: {kind.__name__}") from None


def listed(texts: Texts, name: str) -> list[str]:
    """A field's names or words, with commas or lines between them, each once. Raises HdovdError for what cannot be
    printed.
    """
    parts = [" ".join(part.split()) for text in texts.get(name, ()) for part in re.split(r"[,\r\n]", text)]
    return [*{folded(part): checked_name(part, name) for part in parts if part}.values()]
