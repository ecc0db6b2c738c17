"""The answer of a search: hits, as a table, JSON, COCO results and a page; by a query, or of labels and duplicates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.schema import Level, Source
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log, quiet
from hdovd.data.coco import Split
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.runs.listing import table_lines
from hdovd.pipelines.search.config import Box, BoxSource, Duplicates, SearchConfig
from hdovd.pipelines.search.query import query_of
from hdovd.pipelines.search.scan import (
    BaseLabels,
    Choice,
    alike_pairs,
    best_rows,
    chosen_rows,
    suspicious_rows,
    untypical_rows,
)

NEAR_NAMES = 3


@dataclass(frozen=True, slots=True)
class Hit:
    """A box that was found. `row`: its number within its image, from 0; None: the picture itself. `box`: xyxy, pixels
    of the original image. `name`: class or noun; empty if it has none or the annotations were not read. `cosine`: with
    the query, the class's own text, the mean of the class, or the other one of a pair. `other`: the class that it
    speaks for, and `other_cosine` with its text; or the other one of a pair.
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
    file_name: str | None = None

    @property
    def place(self) -> str:
        """What `--like` takes; of a picture its id."""
        return str(self.image_id) if self.row is None else f"{self.image_id}:{self.row}"

    def values(self) -> dict[str, Any]:
        """As JSON has it, the box as xywh."""
        left, top, right, bottom = self.box
        names = ("image_id", "row", "source", "name", "score", "cosine", "other", "other_cosine", "file_name")
        return {name: getattr(self, name) for name in names} | {"bbox": [left, top, right - left, bottom - top]}


@dataclass(frozen=True, slots=True)
class Searched:
    """A set that is open: `split` and `labels` are None where the annotations were not read."""

    cache: FeatureCache
    split: Split | None = None
    labels: BaseLabels | None = None

    @classmethod
    def open(cls, config: SearchConfig) -> "Searched":
        """Raises HdovdError for a set without rows of boxes, or whose data are asked for and not there."""
        cache = FeatureCache(config.cache, config.features)
        cache.key_inputs(Level.INSTANCE)  # there is such a level
        cache.require_together()
        if not len(cache.row_images()):
            raise HdovdError(f"{cache.url} has no boxes: its instance level is empty")
        if not config.needs_data:
            return cls(cache)
        with quiet():  # the extraction said what it left out
            split, protocol = config.load_for(cache)
        return cls(cache, split, BaseLabels.of(split, protocol.base))

    @property
    def base(self) -> BaseLabels:
        """The labels, of a question that needs them."""
        assert self.labels is not None
        return self.labels

    def hit(self, row: int, cosine: float, other: str = "", other_cosine: float | None = None) -> Hit:
        """What is known of a row."""
        image_id, number = self.cache.place_of(row)
        rows = self.cache.rows_between(row, row + 1)
        proposal, name = bool(rows.source[0] == Source.PROPOSAL), ""
        if proposal and rows.noun[0] >= 0 and (nouns := self.cache.known_nouns()):
            name = nouns[rows.noun[0]]
        if self.labels is not None and (label := self.labels.of_rows(rows)[0]) >= 0:
            name = self.labels.names[label]
        return Hit(
            image_id,
            number,
            tuple(rows.box[0].tolist()),
            BoxSource.PROPOSAL if proposal else BoxSource.BASE,
            name,
            float(rows.score[0]) if proposal else None,
            cosine,
            other,
            other_cosine,
        )


def search(config: SearchConfig) -> list[Hit]:
    """The hits, best first; pages and files that are asked for are written. Raises HdovdError."""
    config.check()
    with quiet(config.json_):
        searched = Searched.open(config)
        hits = _with_files(_found(config, searched, _choice(config, searched)), searched.split)
        if config.coco is not None:
            results = [
                {"image_id": hit.image_id, "category_id": 1, "bbox": hit.values()["bbox"], "score": hit.cosine}
                for hit in hits
            ]
            write_text(config.coco, json.dumps(results))
            log(f"wrote {config.coco}")
        if config.out is not None and searched.split is not None:
            from hdovd.pipelines.search.page import write_page

            write_page(config.out, asked(config), hits, searched.split)
    return hits


def asked(config: SearchConfig) -> str:
    """The question in a line."""
    if config.is_query:
        parts = [*config.queries, *config.image, *(f"like {text}" for text in config.like)]
        parts += [] if config.embeddings is None else [str(config.embeddings)]
        return ", ".join([*parts, *(f"not {text}" for text in config.not_)])
    if config.duplicates is not None:
        return f"near-duplicate {config.duplicates}"
    return "suspicious labels" if config.suspicious else f"untypical boxes of {config.untypical}"


def _found(config: SearchConfig, searched: Searched, chosen: Choice) -> list[Hit]:
    cache = searched.cache
    if config.duplicates is Duplicates.PICTURES:
        return _alike_pictures(config, cache)
    if config.duplicates is Duplicates.BOXES:
        return _alike_boxes(config, searched, chosen)
    if config.suspicious:
        return _suspicious(config, searched, chosen)
    if config.untypical is not None:
        of_class = _and_class(searched.base, config.untypical, "--untypical", chosen)
        best = untypical_rows(cache, config.count, of_class, config.untypical)
        return [searched.hit(row, -value) for value, row in best.pairs()]
    best = best_rows(cache, query_of(config, cache), config.count, chosen)
    return [searched.hit(row, value) for value, row in best.pairs()]


def _suspicious(config: SearchConfig, searched: Searched, chosen: Choice) -> list[Hit]:
    cache, names, hits = searched.cache, searched.base.names, list[Hit]()
    texts = normalised_rows(cache.class_embeddings(names))
    for _, (row, other) in suspicious_rows(cache, texts, searched.base, config.count, chosen).pairs():
        crop = normalised_rows(cache.rows_between(row, row + 1).embedding)[0]
        hit = searched.hit(row, 0.0, names[other], float(texts[other] @ crop))
        hits.append(replace(hit, cosine=float(texts[names.index(hit.name)] @ crop)))
    return hits


def _alike_boxes(config: SearchConfig, searched: Searched, chosen: Choice) -> list[Hit]:
    numbers, rows = chosen_rows(searched.cache, chosen)
    hits, best = list[Hit](), alike_pairs(rows, searched.cache.row_images()[numbers], config.count, config.least)
    for cosine, pair in best.pairs():
        first, second = numbers[pair].tolist()
        hits.append(searched.hit(first, cosine, searched.hit(second, cosine).place))
    return hits


def _alike_pictures(config: SearchConfig, cache: FeatureCache) -> list[Hit]:
    ids, hits = cache.image_ids().tolist(), list[Hit]()
    rows = normalised_rows(np.stack([cache.image_embedding(image_id) for image_id in ids]))
    for cosine, (first, second) in alike_pairs(rows, np.arange(len(rows)), config.count, config.least).pairs():
        width, height = cache.image_size(ids[first])
        hits.append(Hit(ids[first], None, (0, 0, width, height), "picture", "", None, cosine, str(ids[second])))
    return hits


def _with_files(hits: Sequence[Hit], split: Split | None) -> list[Hit]:
    files = {} if split is None else {image.id: image.file_name for image in split.images}
    return [replace(hit, file_name=files.get(hit.image_id)) for hit in hits]


def _choice(config: SearchConfig, searched: Searched) -> Choice:
    """The filters, as one. Raises HdovdError for names that there are not."""
    source = Source.BASE_BOX if config.source is BoxSource.BASE else Source.PROPOSAL
    noun = None if config.noun is None else _number(config.noun, searched.cache.known_nouns(), "--noun", "noun")

    def chosen(rows: InstanceRows) -> np.ndarray:
        mask = np.ones(len(rows.source), bool)
        if config.source is not None:
            mask &= rows.source == source
        if noun is not None:
            mask &= (rows.noun == noun) | (rows.top_noun == noun).any(axis=1)
        if config.min_side:
            mask &= (rows.box[:, 2:] - rows.box[:, :2]).min(axis=1) >= config.min_side
        if config.score is not None:
            mask &= rows.score >= config.score
        return mask

    return chosen if config.class_ is None else _and_class(searched.base, config.class_, "--class", chosen)


def _and_class(labels: BaseLabels, name: str, option: str, chosen: Choice) -> Choice:
    """What is chosen, and of a base class. Raises HdovdError for a class that there is not."""
    label = _number(name, labels.names, option, "base class")
    return lambda rows: chosen(rows) & (labels.of_rows(rows) == label)


def _number(name: str, names: Sequence[str], option: str, what: str) -> int:
    """The place of a name. Raises HdovdError naming those that are near."""
    if name in names:
        return list(names).index(name)
    near = get_close_matches(name, names, NEAR_NAMES, cutoff=0.3) or list(names)
    hint = f"; the nearest are {shorten(list(near))}" if near else f": it has no {what} names"
    raise HdovdError(f"{option} {name}: no {what} of this set{hint}")


def search_lines(hits: Sequence[Hit], config: SearchConfig) -> list[str]:
    """The hits as a table for a terminal."""
    if not hits:
        return [f"nothing found: {asked(config)}"]
    numbers = {"#", "cosine", "its cosine", "score"}
    head = ["#", "cosine", "image:row", "source", "name", "score", "box: left, top, right, bottom"]
    head += ["speaks for", "its cosine"] if config.suspicious else ["like"] if config.duplicates is not None else []
    rows = []
    for number, hit in enumerate(hits, 1):
        score = "-" if hit.score is None else f"{hit.score:.2f}"
        row = [str(number), f"{hit.cosine:.3f}", hit.place, hit.source, hit.name or "-", score]
        row.append(", ".join(f"{value:.0f}" for value in hit.box))
        row += [] if not hit.other else [hit.other]
        row += [] if hit.other_cosine is None else [f"{hit.other_cosine:.3f}"]
        rows.append(row)
    return table_lines(head, rows, numbers)
