"""A set of a cache in other forms: with its pictures and base annotations as tar shards, and from those a cache again,
to the byte; as one Parquet file, or a LanceDB table; or as crops to ask another model about.

The Parquet file is for whatever reads tables: DuckDB, pandas, Polars, Embedding Atlas. A row a box, image by image,
base boxes before proposals; LanceDB's table is the same. Columns; null means that a value is not known or does not
apply:

    image_id       int64
    file_name      string; null without the annotations
    x, y, w, h     float32, pixels of the original image: left, top, width, height
    source         string, base or proposal
    score          float32
    name           string; the class of a base box (null without the annotations), or the noun of a proposal (null if it
                   has none)
    noun_cosine    float32, of a proposal's crop and its noun; null without one
    annotation_id  int64; null for proposals
    embedding      a list of D float32, the values of the cache's float16; null for images that could not be read
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from hdovd.cache import TABLE_ARRAYS, TABLES, Catalog, FeatureSet, Level, Product, Source, row_arrays
from hdovd.cache.reader import FeatureCache, InstanceRows
from hdovd.cache.schema import TOP_ARRAYS
from hdovd.cache.tar_shards import (
    MEMBERS,
    TABLES_HERE,
    TEXTS,
    TarMeta,
    TarSample,
    TarShards,
    TarWriter,
    unfinished_shards,
)
from hdovd.cache.writer import PartFiller, ProductWriter
from hdovd.core import HdovdError, counted, log, system_reason
from hdovd.data import ImageBoxes, Protocol, Split
from hdovd.pipelines.common.atomic_write import replace_file, write_picture, write_text, writing
from hdovd.pipelines.common.console import progress, size
from hdovd.pipelines.common.images import read_image
from hdovd.pipelines.common.options import require_own_folder
from hdovd.pipelines.extraction.identities import inputs_of
from hdovd.pipelines.extraction.source import ExportConfig, ExportForm

QUESTIONS = "questions.jsonl"


def export_tars(config: ExportConfig) -> TarMeta:
    """Write the shards that are not there yet. Raises HdovdError if the set does not fit the data, or a picture is
    gone.
    """
    config.check()
    cache = FeatureCache(config.cache, config.features)
    cache.require_together()
    split, protocol = config.load(cache.set)
    inputs = inputs_of(split, cache)
    for level in inputs.keys() & set(cache.levels()):
        only_images = (
            level is Level.BOXES and not cache.key_inputs(level)["base_boxes"]["count"]
        )  # some imports have no base boxes
        cache.require(level, {"images": inputs[level]["images"]} if only_images else inputs[level])
    about = {"protocol": protocol.to_dict(), "data": {str(level): value for level, value in inputs.items()}}
    writer = TarWriter(config.out, TarMeta.of(Catalog(config.cache), config.features, config.samples, about))
    log(*(f"deleted {name}, left half-written by a process that is dead" for name in writer.folder.sweep()))
    todo, failed = unfinished_shards(writer.folder, range(writer.meta.shards)), cache.failed()
    if len(todo) < writer.meta.shards:
        log(f"{config.out}: there already: {writer.meta.shards - len(todo)} of {writer.meta.shards} shards")
    with progress(None, "tar shards", "image", total=sum(len(writer.meta.places_of(number)) for number in todo)) as bar:
        for wait in (False, True):  # another export of the same may be at some of them
            for number in unfinished_shards(writer.folder, todo):
                with writer.folder.claim(f"{number:06d}.tar", wait=wait) as mine:
                    if mine and unfinished_shards(writer.folder, [number]):
                        images = (split.images[place] for place in writer.meta.places_of(number))
                        writer.write(number, (_sample(cache, split, protocol, image, failed) for image in images))
                        bar.update(len(writer.meta.places_of(number)))
    log(
        f"{config.out}: {writer.meta.images:,d} images in {counted(writer.meta.shards, 'tar shard')}, "
        + size(sum(writer.folder.sizes("").values()))
        + (f"; without embeddings, and so without a picture: {counted(len(failed), 'image')}" if failed else "")
    )
    return writer.meta


def _sample(
    cache: FeatureCache, split: Split, protocol: Protocol, image: ImageBoxes, failed: Mapping[int, str]
) -> TarSample:
    """What the shards hold of an image."""
    boxes = zip(image.annotation_ids.tolist(), image.labels.tolist(), image.boxes.tolist(), strict=True)
    about = {
        "id": image.id,
        "file_name": image.file_name,
        "width": image.width,
        "height": image.height,
        "annotations": [
            {"id": number, "category": protocol.names[label], "bbox": [left, top, right - left, bottom - top]}
            for number, label, (left, top, right, bottom) in boxes
        ],
    }
    if image.judged is not None:
        about["judged"] = [protocol.names[label] for label in np.flatnonzero(image.judged).tolist()]
    if (reason := failed.get(image.id)) is not None:
        return TarSample(image.id, about | {"failed": reason}, None, _arrays(cache, image.id))
    path = split.path(image)
    try:
        picture = path.read_bytes()
    except OSError as error:
        raise HdovdError(
            f"image {image.id}: {path} cannot be read ({system_reason(error)}), but the cache has embeddings of it: "
            f"give the data that it was made from"
        ) from error
    return TarSample(image.id, about, picture, _arrays(cache, image.id))


def _arrays(cache: FeatureCache, image_id: int) -> dict[str, np.ndarray]:
    levels, arrays = cache.levels(), dict[str, np.ndarray]()
    if Level.INSTANCE in levels:
        rows = cache.instances(image_id)
        several = rows.top_noun.shape[1] > 0  # a label of one noun has no such rows
        arrays = {
            name: getattr(rows, array)
            for name, (level, array) in MEMBERS.items()
            if level in levels and level is not Level.IMAGE and (several or array not in TOP_ARRAYS)
        }
    if Level.IMAGE in levels:
        arrays["image"] = cache.image_embedding(image_id)
    return arrays


def import_tars(url: Path | str, cache: Path | str) -> FeatureSet:
    """Write the products that shards were exported from, and name the set as it was. What is there already is left.

    The shards are read twice, in flat memory: once for the boxes, which a product holds before its rows, and to
    verify them. Raises HdovdError, naming the shard, if one is missing or is not the file that was written.
    """
    shards = TarShards(url)
    meta = shards.meta
    if len(shards.numbers) < meta.shards:
        raise HdovdError(
            f"{url} names {len(shards.numbers)} of {meta.shards} shards: give the folder, a cache needs all of them"
        )
    tables = {name: meta.tensors[name] for name in TABLES_HERE} | _box_tables(shards)
    catalog, products, parts = Catalog.create(cache), list[Product](), dict[Level, PartFiller]()
    for level in meta.products:
        attributes = meta.attributes(level)
        writer = ProductWriter.begin(
            catalog.folder,
            level,
            attributes["key_inputs"],
            rows=attributes["rows"],
            part_rows=attributes["part_rows"],
            dim=attributes["dim"],
            tables={name: tables[name] for name in TABLE_ARRAYS[level]},
            names=attributes.get("names"),
            made_with=attributes["made_with"],
        )
        product, exported = writer.product, attributes["part_rows"]
        if product.part_rows != exported and not product.whole:
            raise HdovdError(
                f"{cache} has some of {product}, in parts of {product.part_rows} rows, the shards are of parts of "
                f"{exported}: give another --cache, or finish the extraction"
            )
        _compare(product, meta, TABLES)
        products.append(product)
        if product.parts:
            parts[level] = PartFiller(writer, meta.failed_parts(level))

    def add(level: Level, arrays: dict[str, np.ndarray]) -> None:
        for part in parts[level].add(arrays):
            _compare(Product(catalog.folder, level, meta.features.levels[level]), meta, part)

    for level in parts.keys() & set(TEXTS):
        add(level, {"embedding": meta.tensors[level]})
    for sample in _samples(shards, "writing", verify=False):
        for level in parts.keys() - set(TEXTS):
            arrays = {
                array: sample.arrays[name]
                for name, (of, array) in MEMBERS.items()
                if of is level and array in row_arrays(level, meta.attributes(level)["dim"])
            }
            add(level, {"embedding": arrays["embedding"][None]} if level is Level.IMAGE else arrays)
    for product in products:
        if not product.whole:
            raise HdovdError(
                f"{url} holds too few rows of {product}: {len(product.missing())} parts are not full; export again"
            )
    catalog.write_set(meta.name, meta.features)
    log(f"{cache}: set {meta.name} of {meta.images:,d} images, {size(sum(product.bytes() for product in products))}")
    return meta.features


def _samples(shards: TarShards, what: str, *, verify: bool) -> Iterator[TarSample]:
    packed = chain.from_iterable(shards.raw(number, verify=verify) for number in shards.numbers)
    return (shards.decode(place, raw) for place, raw in progress(packed, what, "image", shards.images))


def _box_tables(shards: TarShards) -> dict[str, np.ndarray]:
    """The tables of the boxes level that have a row a box."""
    names = {array: name for name, (level, array) in MEMBERS.items() if level is Level.BOXES}
    rows = int(shards.meta.tensors["offset"][-1])
    tables = {
        array: np.zeros((rows, 4) if array == "box" else rows, TABLE_ARRAYS[Level.BOXES][array]) for array in names
    }
    start = 0
    for sample in _samples(shards, "reading boxes", verify=True):
        stop = start + len(sample.arrays["boxes"])
        for array, name in names.items():
            tables[array][start:stop] = sample.arrays[name]
        start = stop
    return tables


def _compare(product: Product, meta: TarMeta, part: int | str) -> None:
    """Raises HdovdError if the bytes of a part are not those that were exported; metadata may be of another version of
    Zarr.
    """
    found = json.loads(product.folder.read(product.record_name(part)))["objects"]
    exported = meta.products[product.level]["records"][str(part)]["objects"]
    if wrong := [name for name in found if not name.endswith("zarr.json") and found[name] != exported.get(name)]:
        raise HdovdError(
            f"{product.folder.url}: {wrong[0]} of {product} is not what was exported: were the shards changed? Delete "
            f"{product.prefix} in the cache, and import shards that hdovd exported"
        )


AROUND = 0.1  # of a box's sides, on each side of a crop: what stands around an object helps to name it


def export_crops(config: ExportConfig) -> None:
    """Write the proposals' crops, and before them a line for each as `read_verdicts` takes it. Images that
    could not be read are left out, and told. Raises HdovdError if the set does not fit the data, or a picture is gone.
    """
    config.check()
    out, cache = Path(config.out), FeatureCache(config.cache, config.features)
    require_own_folder(out, QUESTIONS, "crops")
    split, _ = config.load_for(cache)
    images, failed = {image.id: image for image in split.images}, cache.failed()
    nouns = cache.names(Level.NOUN) if Level.NOUN in cache.levels() else []
    lines, of_image = list[str](), cache.row_images()
    rows = cache.rows_between(0, len(of_image))
    mine = [row for row in np.flatnonzero(rows.source == Source.PROPOSAL).tolist() if of_image[row] not in failed]
    for row in mine:
        x, y, right, bottom = rows.box[row].astype(float).tolist()
        about = {"row": row, "image_id": int(of_image[row]), "bbox": [x, y, right - x, bottom - y]}
        names = {nouns[rows.noun[row]]: 1.0} if rows.noun[row] >= 0 else {}
        lines.append(json.dumps(about | {"names": names}) + "\n")
    write_text(out / QUESTIONS, "".join(lines))

    @lru_cache(1)  # the crops of an image come one after the other
    def read(number: int) -> Image:
        image = images[number]
        return read_image(split.path(image), image.width, image.height, exif=split.exif)

    for row in progress(mine, "crops", "crop"):
        image, box = images[int(of_image[row])], rows.box[row].astype(float)
        grown = box + AROUND * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
        inside = np.concatenate([np.floor(grown[:2]), np.ceil(grown[2:])]).clip(0, [image.width, image.height] * 2)
        crop = read(image.id).crop(inside.astype(int).tolist())
        write_picture(out / "crops" / f"{row}.jpg", crop, "JPEG", quality=95)
    log(
        f"wrote {QUESTIONS}, and {len(mine):,d} crops to {out}/crops"
        + (f"; left out: {counted(len(failed), 'image')} that could not be read" if failed else "")
    )


GROUP_ROWS = 16_384  # held in memory: 32 MB of embeddings of 512 values. A row group of Parquet's


def export_parquet(config: ExportConfig) -> None:
    """Write the file whole or not at all. Raises HdovdError for bad input, or without pyarrow."""
    config.check()
    try:
        from pyarrow.parquet import ParquetWriter, read_metadata
    except ImportError as error:
        raise HdovdError("hdovd cache export --to parquet needs pyarrow: pip install 'hdovd[parquet]'") from error
    out, tables = Path(config.out), _tables(config)
    schema = next(tables).schema

    def write(partial: Path) -> None:
        # A float16 in float32 has two bytes of next to nothing: split from the others they take next to no room.
        with ParquetWriter(
            partial,
            schema,
            compression="zstd",
            use_dictionary=["file_name", "source", "name"],
            column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"},
        ) as writer:
            for table in tables:
                writer.write_table(table)

    replace_file(out, write)
    log(f"wrote {out}: {read_metadata(out).num_rows:,d} boxes, {size(out.stat().st_size)}")


LANCE_TABLE = "boxes"


def export_lance(config: ExportConfig) -> None:
    """Write the table of a LanceDB database, whole or not at all: a reader sees what was there until all rows are.
    Raises HdovdError for bad input, or without lancedb.
    """
    config.check()
    try:
        import lancedb
    except ImportError as error:
        raise HdovdError("hdovd cache export --to lance needs lancedb: pip install 'hdovd[lance]'") from error
    tables = _tables(config)
    schema = next(tables).schema
    batches = (batch for table in tables for batch in table.to_batches())
    mode = "overwrite" if Path(config.out, f"{LANCE_TABLE}.lance").exists() else "create"
    with writing(Path(config.out)):
        table = lancedb.connect(str(config.out)).create_table(LANCE_TABLE, batches, schema=schema, mode=mode)
    log(f"wrote {config.out}: table {LANCE_TABLE} of {table.count_rows():,d} boxes")


def _tables(config: ExportConfig) -> Iterator[Any]:
    """pyarrow tables of all rows, GROUP_ROWS at a time, after one without rows."""
    cache = FeatureCache(config.cache, config.features)
    images, (files, classes) = cache.row_images(), _annotated(cache, config)
    with progress(None, str(config.to), "box", total=len(images)) as bar:
        for start, rows in chain([(0, cache.rows_between(0, 0))], cache.blocks(GROUP_ROWS)):
            yield _table(cache, rows, images[start : start + len(rows.box)], files, classes)
            bar.update(len(rows.box))


def _annotated(cache: FeatureCache, config: ExportConfig) -> tuple[dict[int, str], dict[int, str]]:
    """File names by image, class names by annotation. None, and a note, if nobody named the data and they are not where
    the set was made from.
    """
    try:
        split, protocol = config.load_for(cache)
    except HdovdError as error:
        if config.data is not None or config.protocol is not None:
            raise
        log(f"note: there are no file names, and base boxes have no class name: {error}")
        return {}, {}
    classes = {
        number: protocol.names[label]
        for image in split.images
        for number, label in zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
    }
    return {image.id: image.file_name for image in split.images}, classes


def _table(
    cache: FeatureCache, rows: InstanceRows, images: np.ndarray, files: dict[int, str], classes: dict[int, str]
) -> Any:
    """A pyarrow table of rows, which are of `images` (n,)."""
    import pyarrow as pa

    base, unread = rows.source == Source.BASE_BOX, ~rows.embedding.any(axis=1)
    nouns = cache.names(Level.NOUN) if Level.NOUN in cache.levels() else []
    names = [
        nouns[noun] if noun >= 0 else classes.get(number)
        for noun, number in zip(rows.noun.tolist(), rows.annotation_id.tolist(), strict=True)
    ]
    left, top, right, bottom = rows.box.T
    return pa.table(
        {
            "image_id": images,
            "file_name": pa.array([files.get(image) for image in images.tolist()], pa.string()),
            "x": left,
            "y": top,
            "w": right - left,
            "h": bottom - top,
            "source": pa.array(np.where(base, "base", "proposal").tolist(), pa.string()),
            "score": rows.score,
            "name": pa.array(names, pa.string()),
            "noun_cosine": pa.array(rows.noun_cosine, mask=rows.noun < 0),
            "annotation_id": pa.array(rows.annotation_id, mask=~base),
            "embedding": pa.FixedSizeListArray.from_arrays(
                rows.embedding.astype(np.float32).ravel(), cache.dim, mask=pa.array(unread)
            ),
        }
    )


def export(config: ExportConfig) -> None:
    """Write the set in the form that is asked for. Raises HdovdError."""
    {
        ExportForm.WEBDATASET: export_tars,
        ExportForm.PARQUET: export_parquet,
        ExportForm.LANCE: export_lance,
        ExportForm.CROPS: export_crops,
    }[config.to](config)
