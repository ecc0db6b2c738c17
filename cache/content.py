"""What has to be true of the values in a product: its attributes, its tables, the rows of a part."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hdovd.cache.identity import differences, key_of, table_inputs
from hdovd.cache.product import Product
from hdovd.cache.rows import open_rows
from hdovd.cache.schema import CHUNK_ROWS, STORED_NORM_TOLERANCE, TABLE_ARRAYS, TABLES, Level, Source, row_arrays
from hdovd.core.errors import shorten

COSINE_TOLERANCE = 0.01
RANGES_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is wrong in an array; `where`: rows and images, in words."""

    array: str
    expected: str
    found: str
    where: str = ""


def check_attributes(product: Product) -> list[Wrong]:
    """Whether a product's attributes say what its place and its key inputs say."""
    attributes, inputs = product.attributes, product.attributes["key_inputs"]
    if key_of(inputs) != product.key:
        return [Wrong("zarr.json", f"key inputs that give the key {product.key}", key_of(inputs))]
    wanted: dict[str, Any] = {"level": str(product.level), "key": product.key}
    if isinstance(inputs.get("names"), list):
        wanted |= {"names": inputs["names"], "rows": len(inputs["names"])}
    return [
        Wrong("zarr.json", f"{name} {str(value)[:60]}", f"{str(attributes.get(name))[:60]}")
        for name, value in wanted.items()
        if attributes.get(name) != value
    ]


# --- tables ---


def check_tables(product: Product) -> list[Wrong]:
    """The tables of a product against each other, and against its key inputs. Raises what Zarr raises for what it
    cannot read.
    """
    tables = {name: product.table(name) for name in TABLE_ARRAYS[product.level]}
    wrong = [*_check_shapes(product, tables)]
    if wrong or not tables:
        return wrong
    if "offset" in tables:
        wrong += _check_offset(tables["offset"], product.rows)
    wrong += _check_images(tables)
    if not wrong and "box" in tables:
        wrong += _check_boxes(tables)
    if not wrong:
        found = table_inputs(product.level, tables)
        wanted = {name: product.key_inputs[name] for name in found}
        wrong += [
            Wrong(f"parts/{TABLES}.json", "tables that give the key inputs", line)
            for line in differences(wanted, found, sides=("the key inputs say", "the tables give"))
        ]
    return wrong


def _check_shapes(product: Product, tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    rows, images = product.rows, len(tables.get("image_id", ()))
    shapes = {
        "image_id": (rows if product.level is Level.IMAGE else images,),
        "image_hash": (images,),
        "image_size": (images, 2),
        "offset": (images + 1,),
        "box": (rows, 4),
    }
    wanted = {name: (dtype, shapes.get(name, (rows,))) for name, dtype in TABLE_ARRAYS[product.level].items()}
    wanted |= {
        name: (dtype, (rows, product.dim) if wide else (rows,))
        for name, (dtype, wide) in row_arrays(product.level, product.dim).items()
    }
    for name, expected in wanted.items():
        array = tables[name] if name in tables else product.array(name)
        if (str(array.dtype), array.shape) != expected:
            yield Wrong(f"{name}/zarr.json", "{} {}".format(*expected), f"{array.dtype} {array.shape}")


def _check_offset(offset: np.ndarray, rows: int) -> Iterator[Wrong]:
    if offset[0] != 0 or offset[-1] != rows:
        yield Wrong("offset", f"0 to {rows}, the number of rows", f"{offset[0]} to {offset[-1]}")
    for number in np.flatnonzero(np.diff(offset) < 0)[:1]:
        yield Wrong(
            "offset",
            "numbers that do not fall",
            f"{offset[number]}, then {offset[number + 1]}",
            f"image number {number}",
        )


def _check_images(tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    ids, counts = np.unique(tables["image_id"], return_counts=True)
    if len(twice := ids[counts > 1]):
        yield Wrong(
            "image_id", "every image once", f"{len(twice)} ids more than once", f"image {shorten(twice.tolist())}"
        )
    if "image_size" in tables and len(small := tables["image_id"][(tables["image_size"] <= 0).any(axis=1)]):
        yield Wrong("image_size", "widths and heights above 0", "others", f"image {shorten(small.tolist())}")


def _check_boxes(tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    box, named = tables["box"], partial(name_rows, image_id=tables["image_id"], offset=tables["offset"])
    yield from _wrong_rows("box", ~np.isfinite(box).all(axis=1), "finite numbers", box, named)
    yield from _wrong_rows("box", (box[:, 2:] <= box[:, :2]).any(axis=1), "boxes with an area, xyxy", box, named)
    if "image_size" in tables:
        size = np.repeat(tables["image_size"], np.diff(tables["offset"]), axis=0)
        outside = (box[:, :2] < 0).any(axis=1) | (box[:, 2:] > size).any(axis=1)
        yield from _wrong_rows("box", outside, "boxes inside the image of {0[0]}x{0[1]}", box, named, size)
    if "source" in tables:
        source, score, annotation_id = tables["source"], tables["score"], tables["annotation_id"]
        yield from _wrong_rows("source", ~np.isin(source, list(Source)), "0 (base box) or 1 (proposal)", source, named)
        mixed = (annotation_id == -1) != (source == Source.PROPOSAL)
        yield from _wrong_rows("annotation_id", mixed, "-1 for proposals and for nothing else", annotation_id, named)
        yield from _wrong_rows("score", ~np.isfinite(score), "finite numbers", score, named)


# --- rows ---


def check_rows(product: Product, part: int, failed: set[int]) -> Iterator[Wrong]:
    """The rows of one part; `failed`: the images that it says could not be read."""
    strangers = failed - set(
        product.table("image_id").tolist() if failed and "image_id" in TABLE_ARRAYS[product.level] else ()
    )
    if strangers:
        yield Wrong(
            f"parts/{part:06d}.json", "failed images that the product has", f"image {shorten([*sorted(strangers)])}"
        )
    yield from (
        _check_labels(product, part)
        if product.level is Level.PSEUDO_LABEL
        else _check_embeddings(product, part, failed)
    )


def _check_embeddings(product: Product, part: int, failed: set[int]) -> Iterator[Wrong]:
    start, stop = product.rows_of(part)
    rows, norms = open_rows(product, "embedding", parts={part}), np.empty(stop - start, np.float32)
    for first in range(start, stop, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, stop)
        norms[first - start : last - start] = np.linalg.norm(rows.read(first, last).astype(np.float32), axis=1)
    place, named = product.row_objects(part)["embedding"], partial(_named, product, start)
    finite: np.ndarray = np.isfinite(norms)
    zero: np.ndarray = norms == 0
    yield from _wrong_rows(place, ~finite, "finite numbers", np.full(len(norms), "NaN or infinity"), named)
    yield from _wrong_rows(
        place, finite & ~zero & (abs(norms - 1) > STORED_NORM_TOLERANCE), "rows of norm 1", norms, named
    )
    if failed and zero.any():
        image_id, row = product.table("image_id"), np.arange(start, stop)
        image = row if product.level is Level.IMAGE else np.searchsorted(product.table("offset"), row, "right") - 1
        zero = np.logical_and(zero, np.isin(image_id[image], list(failed), invert=True))
    yield from _wrong_rows(
        place, zero, "zeros only for images that could not be read", np.full(len(norms), "zeros"), named
    )


def _check_labels(product: Product, part: int) -> Iterator[Wrong]:
    start, stop = product.rows_of(part)
    places, named = product.row_objects(part), partial(_named, product, start)
    values = {name: open_rows(product, name, parts={part}).read(start, stop) for name in places}
    noun, cosine = values["noun"], values["noun_cosine"]
    key = str(product.key_inputs["noun"])
    nouns = (
        Product(product.folder, Level.NOUN, key).rows
        if product.folder.exists(f"{Level.NOUN}/{key}/zarr.json")
        else None
    )
    most = np.inf if nouns is None else nouns
    last = "the last noun" if nouns is None else str(nouns - 1)
    yield from _wrong_rows(places["noun"], (noun < -1) | (noun >= most), f"-1 to {last}", noun, named)
    wrong = ~(abs(cosine) <= 1 + COSINE_TOLERANCE) | ((noun == -1) & (cosine != 0))
    yield from _wrong_rows(places["noun_cosine"], wrong, "cosines, and 0 where there is no noun", cosine, named)
    if (
        product.dim
    ):  # labels of several nouns: the winner first, weights that add up to 1, nothing where there is no noun
        top, weight, total = values["top_noun"], values["top_weight"], np.where(noun == -1, 0, 1)
        bad = ((top < -1) | (top >= most)).any(axis=1) | (top[:, 0] != noun)
        yield from _wrong_rows(places["top_noun"], bad, "nouns, {} first", top, named, noun)
        sound = (abs(weight.sum(axis=1) - total) <= COSINE_TOLERANCE) & (
            (weight >= 0) & ((top >= 0) | (weight == 0))
        ).all(axis=1)
        yield from _wrong_rows(places["top_weight"], ~sound, "weights that add up to {}", weight, named, total)


def _wrong_rows(
    array: str,
    wrong: np.ndarray | np.bool,
    expected: str,
    values: np.ndarray,
    named: Callable[[np.ndarray], str],
    about: np.ndarray | None = None,
) -> Iterator[Wrong]:
    """One finding for all rows where `wrong` (n,) bool is True, with the value of the first; `expected` may name its
    row of `about`.
    """
    rows = np.flatnonzero(wrong)
    if len(rows):
        value = values[rows[0]]
        found = f"{value:.4g}" if values.dtype.kind == "f" and values.ndim == 1 else str(value.tolist())
        yield Wrong(array, expected if about is None else expected.format(about[rows[0]]), found, named(rows))


def _named(product: Product, start: int, rows: np.ndarray) -> str:
    """Rows of a part that begins at `start`, and what they are of, in words."""
    rows = rows + start
    if product.names:
        return f"{_ranges(rows)} ({shorten([product.names[row] for row in rows])})"
    if product.level is Level.PSEUDO_LABEL:
        return _ranges(rows)
    image_id = product.table("image_id")
    return name_rows(
        rows, image_id, np.arange(len(image_id) + 1) if product.level is Level.IMAGE else product.table("offset")
    )


def name_rows(rows: np.ndarray, image_id: np.ndarray, offset: np.ndarray) -> str:
    """Rows, and the images that they are of, in words."""
    images = image_id[np.unique(np.searchsorted(offset, rows, "right") - 1)].tolist()
    return f"{_ranges(rows)} (image {shorten(images)})"


def _ranges(rows: np.ndarray) -> str:
    """Sorted row numbers in words: "row 3", "rows 3 to 7, 9 and 12 more"."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    shown = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:RANGES_SHOWN])
    rest = sum(map(len, runs[RANGES_SHOWN:]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {rest} more" if rest else "")
