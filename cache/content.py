"""What has to be true of the values in a product: its attributes, its tables, the rows of a part. Read by `hdovd.cache.verify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    attributes, inputs = product.attributes, product.attributes.get("key_inputs", {})
    if key_of(inputs) != product.key:
        return [Wrong("zarr.json", f"key inputs that give the key {product.key}", key_of(inputs))]
    wanted: dict[str, Any] = {"level": str(product.level), "key": product.key}
    if isinstance(inputs.get("names"), list):
        wanted |= {"names": inputs["names"], "rows": len(inputs["names"])}
    wrong = [Wrong("zarr.json", f"{name} {str(value)[:60]}", f"{str(attributes.get(name))[:60]}")
             for name, value in wanted.items() if attributes.get(name) != value]
    if not (isinstance(product.rows, int) and product.rows >= 0 and isinstance(product.part_rows, int) and product.part_rows >= 1
            and isinstance(attributes.get("dim"), int)):
        found = ", ".join(f"{name} {attributes.get(name)!r}" for name in ("rows", "part_rows", "dim"))
        wrong.append(Wrong("zarr.json", "whole numbers", found))
    return wrong


# --- tables ---

def check_tables(product: Product) -> list[Wrong]:
    """The tables of a product against each other, and against its key inputs. Raises what Zarr raises for what it cannot read."""
    wrong = []
    for name, (dtype, wide) in row_arrays(product.level, product.dim).items():
        array, shape = product.array(name), (product.rows, *([product.dim] if wide else []))
        if array.shape != shape or array.dtype != dtype:
            wrong.append(Wrong(f"{name}/zarr.json", f"{dtype} {shape}", f"{array.dtype} {array.shape}"))
    tables = {name: product.table(name) for name in TABLE_ARRAYS[product.level]}
    wrong += _check_shapes(product, tables)
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
        wrong += [Wrong(f"parts/{TABLES}.json", "tables that give the key inputs", line)
                  for line in differences(wanted, found, sides=("the key inputs say", "the tables give"))]
    return wrong


def _check_shapes(product: Product, tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    images = len(tables["image_id"]) if "image_id" in tables else 0
    wanted = {"image_id": (images,), "image_hash": (images,), "image_size": (images, 2), "offset": (images + 1,), "box": (product.rows, 4)}
    if product.level is Level.IMAGE:
        wanted["image_id"] = (product.rows,)
    for name, values in tables.items():
        shape, dtype = wanted.get(name, (product.rows,)), TABLE_ARRAYS[product.level][name]
        if values.shape != shape or values.dtype != dtype:
            yield Wrong(f"{name}/zarr.json", f"{dtype} {shape}", f"{values.dtype} {values.shape}")


def _check_offset(offset: np.ndarray, rows: int) -> Iterator[Wrong]:
    if offset[0] != 0 or offset[-1] != rows:
        yield Wrong("offset", f"0 to {rows}, the number of rows", f"{offset[0]} to {offset[-1]}")
    for number in np.flatnonzero(np.diff(offset) < 0)[:1]:
        yield Wrong("offset", "numbers that do not fall", f"{offset[number]}, then {offset[number + 1]}", f"image number {number}")


def _check_images(tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    ids, counts = np.unique(tables["image_id"], return_counts=True)
    if len(twice := ids[counts > 1]):
        yield Wrong("image_id", "every image once", f"{len(twice)} ids more than once", f"image {shorten(twice.tolist())}")
    if "image_size" in tables and len(small := tables["image_id"][(tables["image_size"] <= 0).any(axis=1)]):
        yield Wrong("image_size", "widths and heights above 0", "others", f"image {shorten(small.tolist())}")


def _check_boxes(tables: Mapping[str, np.ndarray]) -> Iterator[Wrong]:
    box, counts = tables["box"], np.diff(tables["offset"])

    def named(rows: np.ndarray) -> str:
        return name_rows(rows, tables["image_id"], tables["offset"])

    if len(rows := np.flatnonzero(~np.isfinite(box).all(axis=1))):
        yield Wrong("box", "finite numbers", f"{box[rows[0]].tolist()}", named(rows))
    if len(rows := np.flatnonzero((box[:, 2:] <= box[:, :2]).any(axis=1))):
        yield Wrong("box", "boxes with an area, xyxy", f"{box[rows[0]].tolist()}", named(rows))
    if "image_size" in tables:
        size = np.repeat(tables["image_size"], counts, axis=0)
        if len(rows := np.flatnonzero((box[:, :2] < 0).any(axis=1) | (box[:, 2:] > size).any(axis=1))):
            width, height = size[rows[0]]
            yield Wrong("box", f"boxes inside the image of {width}x{height}", f"{box[rows[0]].tolist()}", named(rows))
    if "source" not in tables:
        return
    source, annotation_id, score = tables["source"], tables["annotation_id"], tables["score"]
    if len(rows := np.flatnonzero(~np.isin(source, list(Source)))):
        yield Wrong("source", "0 (base box) or 1 (proposal)", f"{source[rows[0]]}", named(rows))
    if len(rows := np.flatnonzero((annotation_id == -1) != (source == Source.PROPOSAL))):
        yield Wrong("annotation_id", "-1 for proposals and for nothing else", f"{annotation_id[rows[0]]}", named(rows))
    if len(rows := np.flatnonzero(~np.isfinite(score))):
        yield Wrong("score", "finite numbers", f"{score[rows[0]]}", named(rows))


# --- rows ---

def check_rows(product: Product, part: int, failed: set[int]) -> Iterator[Wrong]:
    """The rows of one part; `failed`: the images that it says could not be read."""
    if failed:
        strangers = failed - set(product.table("image_id").tolist() if "image_id" in TABLE_ARRAYS[product.level] else ())
        if strangers:
            yield Wrong(f"parts/{part:06d}.json", "failed images that the product has", f"image {shorten([*sorted(strangers)])}")
    if product.level is Level.PSEUDO_LABEL:
        yield from _check_labels(product, part)
    else:
        yield from _check_embeddings(product, part, failed)


def _check_embeddings(product: Product, part: int, failed: set[int]) -> Iterator[Wrong]:
    start, stop = product.rows_of(part)
    rows, norms = open_rows(product, "embedding", parts={part}), np.empty(stop - start, np.float32)
    for first in range(start, stop, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, stop)
        norms[first - start : last - start] = np.linalg.norm(rows.read(first, last).astype(np.float32), axis=1)
    place = next(iter(product.row_objects(part).values()))
    if len(wrong := np.flatnonzero(~np.isfinite(norms))):
        yield Wrong(place, "finite numbers", "NaN or infinity", _named(product, start + wrong))
    if len(wrong := np.flatnonzero(np.isfinite(norms) & (norms != 0) & (abs(norms - 1) > STORED_NORM_TOLERANCE))):
        yield Wrong(place, "rows of norm 1", f"{norms[wrong[0]]:.4g}", _named(product, start + wrong))
    zero = start + np.flatnonzero(norms == 0)
    if len(zero) and failed:
        zero = zero[~np.isin(_images_of(product, zero), list(failed))]
    if len(zero):
        yield Wrong(place, "zeros only for images that could not be read", "zeros", _named(product, zero))


def _check_labels(product: Product, part: int) -> Iterator[Wrong]:
    start, stop = product.rows_of(part)
    places = product.row_objects(part)
    noun, cosine = (open_rows(product, name, parts={part}).read(start, stop) for name in ("noun", "noun_cosine"))
    key = str(product.key_inputs["noun"])
    nouns = Product(product.folder, Level.NOUN, key).rows if product.folder.exists(f"{Level.NOUN}/{key}/zarr.json") else None
    if len(wrong := np.flatnonzero((noun < -1) | (noun >= (np.inf if nouns is None else nouns)))):
        last = "the last noun" if nouns is None else str(nouns - 1)
        yield Wrong(places["noun"], f"-1 to {last}", f"{noun[wrong[0]]}", _named(product, start + wrong))
    if len(wrong := np.flatnonzero(~(abs(cosine) <= 1 + COSINE_TOLERANCE) | ((noun == -1) & (cosine != 0)))):
        yield Wrong(places["noun_cosine"], "cosines, and 0 where there is no noun", f"{cosine[wrong[0]]}", _named(product, start + wrong))
    if product.dim:
        yield from _check_top(product, part, noun, nouns)


def _check_top(product: Product, part: int, noun: np.ndarray, nouns: int | None) -> Iterator[Wrong]:
    """Labels of several nouns: the winner first, weights that add up to 1, nothing where there is no noun."""
    start, stop = product.rows_of(part)
    places = product.row_objects(part)
    top, weight = (open_rows(product, name, parts={part}).read(start, stop) for name in ("top_noun", "top_weight"))
    bad = ((top < -1) | (top >= (np.inf if nouns is None else nouns))).any(axis=1) | (top[:, 0] != noun)
    if len(wrong := np.flatnonzero(bad)):
        yield Wrong(places["top_noun"], f"nouns, {noun[wrong[0]]} first", f"{top[wrong[0]].tolist()}", _named(product, start + wrong))
    total = np.where(noun == -1, 0, 1)
    sound = (abs(weight.sum(axis=1) - total) <= COSINE_TOLERANCE) & ((weight >= 0) & ((top >= 0) | (weight == 0))).all(axis=1)
    if len(wrong := np.flatnonzero(~sound)):
        yield Wrong(places["top_weight"], f"weights that add up to {total[wrong[0]]}", f"{weight[wrong[0]].tolist()}",
                    _named(product, start + wrong))


def _images_of(product: Product, rows: np.ndarray) -> np.ndarray:
    """(n,) image ids of rows of the image or the instance level."""
    image_id = product.table("image_id")
    found: np.ndarray = image_id[rows if product.level is Level.IMAGE else np.searchsorted(product.table("offset"), rows, "right") - 1]
    return found


def _named(product: Product, rows: np.ndarray) -> str:
    if product.names:
        return f"{_ranges(rows)} ({shorten([product.names[row] for row in rows])})"
    if product.level is Level.IMAGE:
        return f"{_ranges(rows)} (image {shorten(product.table('image_id')[rows].tolist())})"
    if "offset" not in TABLE_ARRAYS[product.level]:
        return _ranges(rows)
    return name_rows(rows, product.table("image_id"), product.table("offset"))


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
