"""The answer of a search: of labels and duplicates, or by a query, which is one direction: the weighted sum of
embeddings of words, pictures, boxes of the cache and rows of a file. And the forms that it is given in: a table, a page
of crops, COCO results.

n rows of a block, K base classes, D embedding size.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache as once, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hdovd.cache import KeyInputs, Level, Source
from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.core import HdovdError, counted, log, quiet, shorten
from hdovd.data import ImageBoxes, Split
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.common.images import decode, read_image
from hdovd.pipelines.common.pages import small_picture_data, write_page
from hdovd.pipelines.detection.names import load_same_clip
from hdovd.pipelines.embedding.embedders import NO_FILE, Picture, Pictures, embedders_of
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES, recipe_of
from hdovd.pipelines.extraction.identities import read_rows
from hdovd.pipelines.runs import table_lines
from hdovd.pipelines.search.config import Box, BoxSource, Duplicates, SearchConfig, weighted
from hdovd.pipelines.search.nearest import Choice, RowIndex, alike_pairs, best_rows, chosen_rows, mean_row, nearest_rows
from hdovd.pipelines.teachers.base import Teacher

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
    results = [
        {"image_id": hit.image_id, "category_id": 1, "name": hit.name, "other": hit.other}
        | {"bbox": [left, top, right - left, bottom - top], "score": hit.cosine}
        for hit in hits
        for left, top, right, bottom in [hit.box]
    ]
    write_text(file, json.dumps(results))
    log(f"wrote {file}")


def search_lines(hits: Sequence[Hit], config: SearchConfig) -> list[str]:
    """The hits as a table for a terminal."""
    rows = [
        (
            str(number),
            f"{hit.cosine:.3f}",
            hit.place,
            hit.source,
            hit.name or "-",
            "-" if hit.score is None else f"{hit.score:.3f}",
            ", ".join(f"{value:.0f}" for value in hit.box),
            hit.other,
            "-" if hit.other_cosine is None else f"{hit.other_cosine:.3f}",
        )
        for number, hit in enumerate(hits, 1)
    ]
    columns = len(HEAD) - (not config.suspicious) - (config.is_query or config.untypical is not None)
    lines = table_lines(HEAD[:columns], [row[:columns] for row in rows], NUMBERS)
    return lines if rows else [f"nothing found: {config.question}"]


def write_crops(file: Path, title: str, hits: Sequence[Hit], searched: "Searched") -> None:
    """Write the hits with their crops; a picture that cannot be read is said in its place."""
    pictures, cards = dict[int, dict[str, Any]](), []
    for hit in hits:
        card = {"hit": hit, "crop": "", "problem": ""}
        try:
            picture = searched.picture(hit.image_id)
            card["crop"], image = crop_of(picture, hit), searched.images[hit.image_id]
            pictures[hit.image_id] = {"data": small_picture_data(picture, PICTURE_SIDE), "image": image}
        except HdovdError as error:
            card["problem"] = str(error)
        cards.append(card)
    write_page(file, "search.html", {"title": title, "cards": cards, "pictures": pictures})


def crop_of(picture: Image.Image, hit: Hit) -> str:
    """The hit's box of its picture, a pixel at least, as a data: address."""
    left, top, right, bottom = map(round, hit.box)
    return small_picture_data(picture.crop((left, top, max(right, left + 1), max(bottom, top + 1))), CROP_SIDE)


@dataclass(frozen=True, slots=True)
class Searched:
    """A set that is open. Where the annotations were read: `split`, `names` (K) of its base classes, and `labels`, the
    class of a base box by annotation id, and `images` by id. `clip_of`: the CLIP of the set, loaded once.
    """

    cache: FeatureCache
    clip_of: Callable[[], Teacher]
    split: Split | None = None
    names: tuple[str, ...] = ()
    labels: dict[int, int] = field(default_factory=dict)
    images: dict[int, ImageBoxes] = field(default_factory=dict)

    def labels_of(self, rows: InstanceRows) -> np.ndarray:
        """(n,) int64, -1 for what is no base box, or has no annotation."""
        return np.array([self.labels.get(number, -1) for number in rows.annotation_id.tolist()], np.int64)

    def hit(self, row: int, cosine: float, other: str = "", other_cosine: float | None = None) -> Hit:
        """A row, by its number in the set."""
        rows, nouns = self.cache.rows_between(row, row + 1), self.cache.known_nouns()
        label, noun = self.labels_of(rows)[0], rows.noun[0]
        name = self.names[label] if label >= 0 else nouns[noun] if nouns and noun >= 0 else ""
        kind = BoxSource.BASE if rows.source[0] == Source.BASE_BOX else BoxSource.PROPOSAL
        box, score = tuple(rows.box[0].tolist()), float(rows.score[0])
        return Hit(*self.cache.place_of(row), box, kind, name, score, cosine, other, other_cosine)

    def picture(self, image_id: int) -> Image.Image:
        """Raises HdovdError for one that cannot be read, or that there is not."""
        if self.split is None or image_id not in self.images:
            raise HdovdError(f"the cache has no image {image_id}")
        image = self.images[image_id]
        return read_image(self.split.path(image), image.width, image.height, exif=self.split.exif)


def search(config: SearchConfig) -> list[Hit]:
    """The hits, best first; pages and files that are asked for are written. Raises HdovdError."""
    config.check()
    with quiet(config.json_):
        searched = opened(config)
        hits = found(config, searched)
        if config.coco is not None:
            write_results(config.coco, hits)
        if config.out is not None:
            write_crops(config.out, config.question, hits, searched)
    return hits


def opened(config: SearchConfig, *, pictures: bool = False) -> Searched:
    """The set to search; pictures: with its annotations, which say where these are, whatever is asked for.

    Raises HdovdError for a set without rows of boxes, or whose data are needed and not there.
    """
    cache = FeatureCache(config.cache, config.features)
    cache.key(Level.INSTANCE)  # there is such a level
    cache.require_together()
    if not len(cache.row_images()):
        raise HdovdError(f"{cache.url} has no boxes: its instance level is empty")
    clip_of = once(partial(_load_set_clip, config, cache))
    if not (pictures or config.suspicious or config.of_class or config.out or config.data):
        return Searched(cache, clip_of)
    with quiet():  # the extraction said what it left out
        split, protocol = config.load_for(cache)
    labels = {
        number: label
        for image in split.images
        for number, label in zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
    }
    return Searched(cache, clip_of, split, protocol.base, labels, {image.id: image for image in split.images})


def found(config: SearchConfig, searched: Searched, pictures: Mapping[str, bytes] | None = None) -> list[Hit]:
    """The hits in a set that is open, best first. pictures: as `query_of` takes them. Raises HdovdError."""
    chosen = _choice(config, searched)
    if config.duplicates is not None:
        return list(_duplicates(config, searched, chosen))
    if config.suspicious:
        return list(_suspicious(config, searched, chosen))
    index = RowIndex(searched.cache, "--features", config.features) if config.index else None
    query, sign = (
        (query_of(config, searched, pictures), 1)
        if config.is_query
        else (normalised_rows(mean_row(searched.cache, chosen)[None])[0], -1)
    )
    best = (index.best if index else partial(nearest_rows, searched.cache))(sign * query, config.count, chosen)
    return [searched.hit(row, sign * value) for value, row in best.pairs()]


def _suspicious(config: SearchConfig, searched: Searched, chosen: Choice) -> Iterator[Hit]:
    """Base boxes whose crop is more like the text of another base class than that of their own, by how much."""
    texts = normalised_rows(searched.cache.class_embeddings(searched.names))

    def excess(rows: InstanceRows, cosines: np.ndarray) -> np.ndarray:
        own, every = searched.labels_of(rows), np.arange(len(cosines))
        mine = cosines[every, own]
        cosines[every, own] = -np.inf
        more = cosines.max(axis=1) - mine
        return np.where(chosen(rows) & (own >= 0) & (more > 0), more, np.nan)

    for _, row in best_rows(searched.cache, texts, config.count, excess).pairs():
        rows = searched.cache.rows_between(row, row + 1)
        cosines, own = texts @ normalised_rows(rows.embedding)[0], searched.labels_of(rows)[0]
        other = int(cosines.argmax())
        yield searched.hit(row, float(cosines[own]), searched.names[other], float(cosines[other]))


def _duplicates(config: SearchConfig, searched: Searched, chosen: Choice) -> Iterator[Hit]:
    """Pairs of pictures, or of boxes of two pictures."""
    cache, of_pictures = searched.cache, config.duplicates is Duplicates.PICTURES
    if of_pictures:
        numbers = groups = cache.image_ids()
        rows = np.stack([cache.image_embedding(image_id) for image_id in numbers.tolist()])
    else:
        numbers = chosen_rows(cache, chosen)
        groups, rows = cache.row_images()[numbers], cache.rows_at(numbers).embedding
    for cosine, pair in alike_pairs(normalised_rows(rows), groups, config.count, config.least).pairs():
        first, second = numbers[pair].tolist()
        if of_pictures:
            yield Hit(first, None, (0.0, 0.0, *cache.image_size(first)), "picture", "", None, cosine, str(second))
        else:
            yield searched.hit(first, cosine, searched.hit(second, cosine).place)


def _choice(config: SearchConfig, searched: Searched) -> Choice:
    """The filters, as one. Raises HdovdError for names that there are not."""
    source = Source.BASE_BOX if config.source is BoxSource.BASE else Source.PROPOSAL
    noun = -2 if config.noun is None else _number(config.noun, searched.cache.known_nouns(), "noun")
    label = None if config.of_class is None else _number(config.of_class, searched.names, "base class")

    def chosen(rows: InstanceRows) -> np.ndarray:
        of_source, of_noun = rows.source == source, (rows.noun == noun) | (rows.top_noun == noun).any(axis=1)
        sides, of_class = rows.box[:, 2:] - rows.box[:, :2], np.ones(len(rows.box), bool)
        if label is not None:
            of_class = searched.labels_of(rows) == label
        enough = (sides.min(axis=1) >= config.min_side) & (rows.score >= config.score)
        fit = enough & of_class & (of_source | (config.source is None)) & (of_noun | (config.noun is None))
        return np.asarray(fit)

    return chosen


def _number(name: str, names: Sequence[str], what: str) -> int:
    """The place of a name. Raises HdovdError naming those that are near."""
    if name not in names:
        near = get_close_matches(name, names, cutoff=0.3) or list(names)
        raise HdovdError(
            f"{name}: no {what} of this set; " + (f"the nearest: {shorten([*near])}" if near else "none is")
        )
    return list(names).index(name)


LEAST_NORM = 1e-6  # of the sum of a query's parts


def query_of(config: SearchConfig, searched: Searched, pictures: Mapping[str, bytes] | None = None) -> np.ndarray:
    """(D,) float32 of norm 1. pictures: those of `config.image` that are no files. Raises HdovdError for a part that
    cannot be had, and if the parts add up to nothing.
    """
    cache = searched.cache
    parts = [(weight, _row_of_cache(cache, text)) for text, weight in map(weighted, config.like)]
    if config.embeddings is not None:
        parts += [(1.0, row) for row in normalised_rows(np.atleast_2d(read_rows(config.embeddings)))]
    if config.queries or config.not_ or config.image:
        clip = searched.clip_of()
        parts += [
            *((weight, _embed_text(clip, cache, text)) for text, weight in map(weighted, config.queries)),
            *((-weight, _embed_text(clip, cache, text)) for text, weight in map(weighted, config.not_)),
            *(
                (weight, _embed_picture(clip, cache, Path(name), (pictures or {}).get(name), config.box))
                for name, weight in map(weighted, config.image)
            ),
        ]
    if other := [row.shape for _, row in parts if row.shape != (cache.dim,)]:
        raise HdovdError(
            f"a part of the query has shape {other[0]}, the set's embeddings have {cache.dim} values: the rows of "
            "--embeddings, or --clip, are of another CLIP"
        )
    total = np.sum([weight * row for weight, row in parts], axis=0)
    if not np.linalg.norm(total) >= LEAST_NORM:  # nor if it is no number
        raise HdovdError("the parts of the query add up to nothing: they cancel each other out, or are no embeddings")
    return np.asarray(normalised_rows(total[None])[0])


def _row_of_cache(cache: FeatureCache, text: str) -> np.ndarray:
    """(D,) float32 of norm 1, of IMAGE_ID:ROW. Raises HdovdError."""
    found = re.fullmatch(r"(-?\d+):(\d+)", text)
    if found is None:
        raise HdovdError(f"--like {text}: expected IMAGE_ID:ROW, as the table of a search prints it, such as 139:0")
    rows, row = cache.instance_embeddings(int(found[1])), int(found[2])
    if row >= len(rows) or not rows[row].any():
        why = cache.failed().get(int(found[1]), f"the image has {counted(len(rows), 'row')}, from 0 on")
        raise HdovdError(f"--like {text}: there is no such row, or no embedding of it: {why}")
    return np.asarray(normalised_rows(rows[row : row + 1])[0])


def _load_set_clip(config: SearchConfig, cache: FeatureCache) -> Teacher:
    """The CLIP that made the set's embeddings. Raises HdovdError if it cannot be had, or is another one."""
    made = cache.set.made_from
    if config.clip is None and ("clip" not in made or "teacher" in made):
        raise HdovdError(
            f"set {config.features} of {cache.url} does not say where its CLIP is: give --clip (with --pretrained, as "
            "for hdovd extract-clip), or search by --like or --embeddings, which need none"
        )
    return load_same_clip(
        (str(made.get("clip")), made.get("pretrained")) if config.clip is None else (config.clip, config.pretrained),
        cache.key_inputs(Level.INSTANCE),
        _class_inputs(cache),
        pick_device(config.device),
        given=config.clip is not None,
        whose="set",
        without="search by --like or --embeddings",
    )


def _class_inputs(cache: FeatureCache) -> KeyInputs:
    return cache.key_inputs(Level.CLASS) if Level.CLASS in cache.levels() else {}


def _embed_text(clip: Teacher, cache: FeatureCache, text: str) -> np.ndarray:
    """(D,) float32, in the prompts of the set's names. Raises HdovdError for a text that becomes no token."""
    templates = _class_inputs(cache).get("templates") or cache.set.made_from.get("templates")
    if clip.hash_prompts([text], ["{}"]) == clip.hash_prompts([""], ["{}"]):
        raise HdovdError(f"{text!r}: the tokenizer of the set's CLIP makes nothing of it; give other words")
    return np.asarray(clip.embed_names([text], tuple(templates or DEFAULT_TEMPLATES))[0])


def _embed_picture(clip: Teacher, cache: FeatureCache, file: Path, data: bytes | None, box: Box | None) -> np.ndarray:
    """(D,) float32 of a box of an upright picture, a file or the bytes of one, as the set's boxes were embedded. Raises
    HdovdError for a picture that cannot be read, and a box that is not within it.
    """
    picture = decode(file if data is None else data)
    left, top, wide, high = box or (0, 0, picture.width, picture.height)
    if not (0 <= left < left + wide <= picture.width and 0 <= top < top + high <= picture.height):
        raise HdovdError(
            f"--box {left:g},{top:g},{wide:g},{high:g} is not within {file}, which is {picture.width}x{picture.height}"
        )
    height, width = picture.pixels.shape[1:]  # fewer than the picture's, if it is a large one
    scale = np.array([width / picture.width, height / picture.height] * 2, np.float32)
    boxes, one = scale * np.array([[left, top, left + wide, top + high]], np.float32), np.zeros(1, np.int64)
    pictures = Pictures(
        [ImageBoxes(0, file.name, width, height, boxes, one, one)], lambda _: file, np.array([0, 1]), boxes
    )
    embedder = embedders_of(clip, pictures, recipe_of(cache.key_inputs(Level.INSTANCE)))[Level.INSTANCE]
    rows, _ = embedder.embed([one], lambda *_: Picture(picture.pixels, NO_FILE))
    return np.asarray(rows[0])
