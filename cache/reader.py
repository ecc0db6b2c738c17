"""Reading a set of products: small tables in memory, instance embeddings mapped. What `hdovd train` sees of a cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.catalog import Catalog
from hdovd.cache.identity import KeyInputs, differences, key_of, require_same
from hdovd.cache.product import Product
from hdovd.cache.rows import Rows
from hdovd.cache.schema import DEFAULT_SET, PART_ROWS, STORED_NORM_TOLERANCE, TABLES, Level, Source, row_arrays
from hdovd.core import HdovdError


@dataclass(frozen=True, slots=True)
class InstanceRows:
    """The rows of one image, base boxes first, then proposals best first.

    embedding (n, D) float16, box (n, 4) float32 xyxy pixels, source (n,) uint8, annotation_id (n,) int64, score (n,)
    float32, noun (n,) int32 (-1: none), noun_cosine (n,) float32; top_noun (n, k) int32 (-1: none) and top_weight (n,
    k) float32, the nouns that a label is made of, k = 0 where that is `noun` alone.
    """

    embedding: np.ndarray
    box: np.ndarray
    source: np.ndarray
    annotation_id: np.ndarray
    score: np.ndarray
    noun: np.ndarray
    noun_cosine: np.ndarray
    top_noun: np.ndarray
    top_weight: np.ndarray

    def select(self, rows: np.ndarray) -> "InstanceRows":
        """These rows: an index or a mask."""
        return InstanceRows(*(getattr(self, name)[rows] for name in self.__slots__))

    def base_boxes(self) -> "InstanceRows":
        return self.select(self.source == Source.BASE_BOX)

    def proposals(self) -> "InstanceRows":
        return self.select(self.source == Source.PROPOSAL)


def no_labels(count: int) -> dict[str, np.ndarray]:
    """The label fields of `InstanceRows` for rows without pseudo labels."""
    return {
        "noun": np.full(count, -1, np.int32),
        "noun_cosine": np.zeros(count, np.float32),
        "top_noun": np.zeros((count, 0), np.int32),
        "top_weight": np.zeros((count, 0), np.float32),
    }


class FeatureCache:
    """One set of a cache, every product of it whole. Safe in DataLoader workers: a copy opens its own handles."""

    def __init__(
        self, url: str | Path, features: str = DEFAULT_SET, *, mapped: bool | None = None, checked: bool = True
    ) -> None:
        """`features`: the set's name. `mapped`, `checked`: as in `rows.Rows`, of instance rows; all else is always
        checked.

        Raises HdovdError if the set is not there, not whole, or its metadata are not what was written.
        """
        self._again = partial(FeatureCache, url, features, mapped=mapped, checked=checked)
        self.url, self._mapped, self._checked = str(url), mapped, checked
        catalog = Catalog(url)
        sets = catalog.sets()
        if features not in sets:
            others = (
                f"it has {', '.join(sets)}"
                if sets
                else "its extraction has not finished: run the extract-clip command again"
            )
            raise HdovdError(f"{url} has no set of features named {features}; {others}")
        self.set = sets[features]
        self._products = {level: Product(catalog.folder, level, key) for level, key in self.set.levels.items()}
        for product in self._products.values():
            if not product.whole:
                raise HdovdError(
                    f"{url}: {product} is not whole, {len(product.missing())} of {product.parts} parts are missing: "
                    "run the extract-clip command again, it goes on where it was"
                )
            product.require_sound(TABLES, ["zarr.json"])
        self._table = cache(self._read_table)
        self._rows_by_image = cache(self._number_rows)

    def __reduce__(self) -> Any:
        return self._again, ()

    def levels(self) -> list[Level]:
        """Levels that the set has."""
        return [level for level in Level if level in self._products]

    def key(self, level: Level) -> str:
        """Key of the product of a level. Raises HdovdError if the set has none."""
        return self.product(level).key

    def products(self) -> list[Product]:
        """Products of all levels of the set."""
        return list(self._products.values())

    def key_inputs(self, level: Level) -> KeyInputs:
        """What made the level. Raises HdovdError if they were changed since."""
        return self.product(level).key_inputs

    def identity(self) -> dict[str, Any]:
        """Keys and inputs of all levels, for a run's record."""
        return {
            "path": self.url if "://" in self.url else str(Path(self.url).resolve()),
            "levels": {
                str(level): {"key": self.key(level), "inputs": self.key_inputs(level)} for level in self.levels()
            },
        }

    def require(self, level: Level, expected: KeyInputs) -> None:
        """Refuse a level whose inputs differ from `expected` (a part of its inputs). Raises HdovdError."""
        found = self.key_inputs(level)
        require_same(
            expected,
            {name: found.get(name) for name in expected},
            f"the {level} level of {self.url} does not fit this data",
            "Extract it with hdovd extract-clip (what did not change is kept), or give the data it was made from.",
        )

    def require_together(self) -> None:
        """Refuse a set whose levels do not belong together: other CLIPs, or embeddings of other boxes. Raises
        HdovdError.
        """
        require_together(self.url, {level: self.key_inputs(level) for level in self.levels()})
        rows = {
            level: self._products[level].rows
            for level in (Level.BOXES, Level.INSTANCE, Level.PSEUDO_LABEL)
            if level in self._products
        }
        if len(set(rows.values())) > 1:
            raise HdovdError(
                f"{self.url}: levels of the same boxes have other numbers of rows: "
                + ", ".join(f"{level} {count}" for level, count in rows.items())
            )

    def names(self, level: Level) -> list[str]:
        """Class or noun names, in row order."""
        return self.product(level).names

    def known_nouns(self) -> list[str]:
        """Nouns in row order; empty if the set has none, or nobody knows their words, as of an import's texts."""
        known = Level.NOUN in self._products and not isinstance(self.key_inputs(Level.NOUN).get("names"), dict)
        return self.names(Level.NOUN) if known else []

    def embeddings(self, level: Level) -> np.ndarray:
        """(n, D) float32 rows of the class, noun or image level, held in memory as float16."""
        return self._table(level, "embedding").astype(np.float32)

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that was not extracted."""
        have = {name: row for row, name in enumerate(self.names(Level.CLASS))}
        if missing := [n for n in names if n not in have]:
            raise HdovdError(f"{self.url} has no text embedding of {missing[:8]}: extract it with the same --protocol")
        return self.embeddings(Level.CLASS)[[have[n] for n in names]]

    @property
    def dim(self) -> int:
        """D, the size of every embedding."""
        return self.product(Level.CLASS if Level.CLASS in self._products else Level.INSTANCE).dim

    def failed(self) -> dict[int, str]:
        """Images that lack embeddings at the image or the instance level, with the reason."""
        return dict(self._failed)

    @cached_property
    def _failed(self) -> dict[int, str]:
        return {
            image: reason
            for level in (Level.IMAGE, Level.INSTANCE)
            if level in self._products
            for image, reason in self._products[level].failed().items()
        }

    def counts(self, source: Source) -> dict[int, int]:
        """How many instance rows of a source each image has; no embedding is read."""
        ends = np.concatenate([[0], np.cumsum(self._table(Level.BOXES, "source") == source)])[
            self._table(Level.BOXES, "offset")
        ]
        return dict(zip(self.image_ids().tolist(), np.diff(ends).tolist(), strict=True))

    def named_share(self) -> float:
        """The share of proposals that have a label; 0 without proposals, 1 if the set is without labels."""
        if Level.PSEUDO_LABEL not in self._products:
            return 1.0
        nouns = self._table(Level.PSEUDO_LABEL, "noun")[self._table(Level.BOXES, "source") == Source.PROPOSAL]
        return float((nouns >= 0).sum() / max(len(nouns), 1))

    def image_embedding(self, image_id: int) -> np.ndarray:
        """(D,) float16."""
        return np.asarray(self._table(Level.IMAGE, "embedding")[self._row(Level.IMAGE, image_id)])

    def instance_embeddings(self, image_id: int) -> np.ndarray:
        """(n, D) float16, the instance rows of one image."""
        row, offset = self._row(Level.INSTANCE, image_id), self._table(Level.INSTANCE, "offset")
        return self._instances.read(int(offset[row]), int(offset[row + 1]))

    @cached_property
    def _instances(self) -> Rows:
        return Rows(self.product(Level.INSTANCE), "embedding", mapped=self._mapped, checked=self._checked)

    @property
    def reads_best_in_blocks(self) -> bool:
        """Whether instance rows that are read in random order are decoded again and again (see
        `dataloading.loader`).
        """
        return Level.INSTANCE in self._products and self._instances.reads_best_in_blocks

    def instances(self, image_id: int) -> InstanceRows:
        """The instance rows of one image with what is known of their boxes."""
        row, offset = self._row(Level.BOXES, image_id), self._table(Level.BOXES, "offset")
        return self.rows_between(int(offset[row]), int(offset[row + 1]))

    def rows_between(self, start: int, stop: int, *, copy: bool = True) -> InstanceRows:
        """Instance rows by their number in the product, with what is known of their boxes. `copy`: as in `Rows.read`,
        of embeddings.
        """
        return self._with_boxes(self._instances.read(start, stop, copy=copy), slice(start, stop))

    def rows_at(self, numbers: np.ndarray) -> InstanceRows:
        """Instance rows of these numbers (n,) in the product, as `rows_between`."""
        read = self._instances.read
        embedding = np.concatenate([read(0, 0), *(read(row, row + 1, copy=False) for row in numbers.tolist())])
        return self._with_boxes(embedding, numbers)

    def _with_boxes(self, embedding: np.ndarray, which: slice | np.ndarray) -> InstanceRows:
        known = {name: self._table(level, name)[which] for name, level in self._box_tables.items()}
        return InstanceRows(embedding, **no_labels(len(embedding)) | known)

    @cached_property
    def _box_tables(self) -> dict[str, Level]:
        """What is known of a box: names of tables, and the level of each."""
        tables = dict.fromkeys(("box", "source", "annotation_id", "score"), Level.BOXES)
        if Level.PSEUDO_LABEL in self._products:
            tables |= dict.fromkeys(
                row_arrays(Level.PSEUDO_LABEL, self._products[Level.PSEUDO_LABEL].dim), Level.PSEUDO_LABEL
            )
        return tables

    def blocks(self, size: int) -> Iterator[tuple[int, InstanceRows]]:
        """All instance rows in order, `size` at a time, each after the number of its first, to be read only. What is
        mapped counts as memory of this process for a part's rows at most.
        """
        count = len(self._table(Level.BOXES, "box"))
        for start in range(0, count, size):
            if start % PART_ROWS < size:
                self._instances.release()
            yield start, self.rows_between(start, min(start + size, count), copy=False)

    def place_of(self, row: int) -> tuple[int, int]:
        """The image of an instance row, and the row's number within that image."""
        offset = self._table(Level.BOXES, "offset")
        image = int(np.searchsorted(offset, row, "right")) - 1
        return int(self.image_ids()[image]), row - int(offset[image])

    def image_ids(self) -> np.ndarray:
        """(N,) int64, the images that have rows, in row order."""
        return self._table(Level.BOXES, "image_id")

    def image_size(self, image_id: int) -> tuple[int, int]:
        """Width and height of the original image, pixels."""
        width, height = self._table(Level.BOXES, "image_size")[self._row(Level.BOXES, image_id)].tolist()
        return width, height

    def row_images(self) -> np.ndarray:
        """(M,) int64, the image of every instance row."""
        return np.repeat(self.image_ids(), np.diff(self._table(Level.BOXES, "offset")))

    def hold(self, level: Level) -> None:
        """Read what is held in memory of the image or instance level now, so that worker processes forked later share
        it.
        """
        if level is Level.IMAGE:
            self._table(level, "embedding")
            self._rows_by_image(level)
            return
        for name, its_level in {"offset": Level.BOXES, **self._box_tables}.items():
            self._table(its_level, name)
        self._rows_by_image(Level.BOXES)
        _ = self._instances

    def _row(self, level: Level, image_id: int) -> int:
        row = self._rows_by_image(level).get(image_id)
        if row is None:
            raise HdovdError(f"{self.url}: level {level} has no rows of image {image_id}")
        return row

    def _number_rows(self, level: Level) -> dict[int, int]:
        return {image: row for row, image in enumerate(self._table(level, "image_id").tolist())}

    def product(self, level: Level) -> Product:
        """The product of a level. Raises HdovdError if the set has none."""
        if level not in self._products:
            raise HdovdError(f"{self.url} has no {level} level; it has {', '.join(self.levels()) or 'none'}")
        return self._products[level]

    def _read_table(self, level: Level, name: str) -> np.ndarray:
        return self.product(level).table(name)


def require_together(url: str, inputs: dict[Level, KeyInputs]) -> None:
    """Refuse levels, given by what made them, that do not belong together. Raises HdovdError naming `url` and what
    differs.
    """
    with_clip = [level for level in inputs if "clip" in inputs[level]]
    lines = [
        f"{with_clip[0]} and {level}: {line}"
        for level in with_clip[1:]
        for line in differences(inputs[with_clip[0]]["clip"], inputs[level]["clip"], "clip.")
    ]
    if Level.INSTANCE in inputs and Level.BOXES in inputs:
        lines += [
            f"instance and boxes: {line}"
            for line in differences(inputs[Level.INSTANCE]["boxes"], inputs[Level.BOXES]["boxes"], "boxes.")
        ]
    labels = inputs.get(Level.PSEUDO_LABEL, {})
    for level in (Level.INSTANCE, Level.NOUN) if labels else ():
        have = key_of(inputs[level]) if level in inputs else "none"
        if labels[level] != have:
            lines.append(f"pseudo_label and {level}: it was made from {labels[level]}, the set has {have}")
    if lines:
        raise HdovdError(f"{url}: these levels cannot be used together:\n  " + "\n  ".join(lines))


def require_unit(rows: np.ndarray, what: str) -> None:
    """Raises HdovdError, naming `what`, unless embeddings (n, D) float16 are finite and of norm one."""
    norms = np.linalg.norm(rows.astype(np.float32), axis=1)
    if len(wrong := np.flatnonzero(~(abs(norms - 1) <= STORED_NORM_TOLERANCE))):
        raise HdovdError(
            f"{what}: expected rows of norm 1, found {norms[wrong[0]]:.4g} ({len(wrong)} of {len(rows)} rows): they "
            f"are damaged; hdovd cache verify tells more"
        )


def normalised_rows(rows: np.ndarray) -> np.ndarray:
    """Stored float16 rows (n, D), of norm one again in float32; rows of zeros, which no embedding is, stay so."""
    wide = rows.astype(np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))
