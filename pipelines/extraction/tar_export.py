"""A set of a cache, with its pictures and base annotations, as tar shards; and from tar shards a cache again, to the
byte.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import TABLE_ARRAYS, TABLES, Level, row_arrays
from hdovd.cache.tar_shards import MEMBERS, TABLES_HERE, TEXTS, TarMeta, TarSample, TarShards, TarWriter
from hdovd.cache.writer import ProductWriter
from hdovd.core.errors import HdovdError, counted, system_reason
from hdovd.core.log import log
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol
from hdovd.pipelines.common.console import progress, size
from hdovd.pipelines.extraction.identities import inputs_of
from hdovd.pipelines.extraction.source import TarExportConfig

# --- to tar shards ---


def export_tars(config: TarExportConfig) -> TarMeta:
    """Write the shards that are not there yet. Raises HdovdError if the set does not fit the data, or a picture is
    gone.
    """
    config.check()
    cache = FeatureCache(config.cache, config.features)
    cache.require_together()
    split, protocol = config.source.load(cache.set)
    inputs = inputs_of(split, cache)
    for level in inputs.keys() & set(cache.levels()):
        only_images = (
            level is Level.BOXES and not cache.key_inputs(level)["base_boxes"]["count"]
        )  # some imports have no base boxes
        cache.require(level, {"images": inputs[level]["images"]} if only_images else inputs[level])
    about = {"protocol": protocol.to_dict(), "data": {str(level): value for level, value in inputs.items()}}
    writer = TarWriter(config.out, TarMeta.of(Catalog(config.cache), config.features, config.samples, about))
    for name in writer.folder.sweep():
        log(f"deleted {name}, left half-written by a process that is dead")
    todo, exporter = writer.unfinished(), _Exporter(cache, split, protocol)
    if len(todo) < writer.meta.shards:
        log(f"{config.out}: there already: {writer.meta.shards - len(todo)} of {writer.meta.shards} shards")
    with progress(None, "tar shards", "image", total=sum(len(writer.meta.places_of(number)) for number in todo)) as bar:

        def write(number: int, *, wait: bool) -> bool:
            with writer.folder.claim(f"{number:06d}.tar", wait=wait) as mine:
                if mine and not writer.is_finished(number):
                    writer.write(number, (exporter.sample(place) for place in writer.meta.places_of(number)))
                bar.update(len(writer.meta.places_of(number)) if mine else 0)
                return mine

        busy = [number for number in todo if not write(number, wait=False)]  # another export of the same is at these
        for number in busy:
            write(number, wait=True)
    failed, count, total = cache.failed(), writer.meta.shards, size(sum(writer.folder.sizes("").values()))
    log(
        f"{config.out}: {writer.meta.images:,d} images in {counted(count, 'tar shard')}, {total}"
        + (f"; without embeddings, and so without a picture: {counted(len(failed), 'image')}" if failed else "")
    )
    return writer.meta


class _Exporter:
    """Makes the sample of any image."""

    def __init__(self, cache: FeatureCache, split: Split, protocol: Protocol) -> None:
        self._cache, self._split, self._names = cache, split, protocol.names
        self._failed, self._levels = cache.failed(), set(cache.levels())

    def sample(self, place: int) -> TarSample:
        image = self._split.images[place]
        reason = self._failed.get(image.id)
        about = {
            "id": image.id,
            "file_name": image.file_name,
            "width": image.width,
            "height": image.height,
            "annotations": list(self._annotations(image)),
        } | ({} if reason is None else {"failed": reason})
        return TarSample(image.id, about, None if reason is not None else self._picture(image), self._arrays(image))

    def _annotations(self, image: ImageBoxes) -> Iterator[dict[str, Any]]:
        for number, label, (left, top, right, bottom) in zip(
            image.annotation_ids.tolist(), image.labels.tolist(), image.boxes.tolist(), strict=True
        ):
            yield {"id": number, "category": self._names[label], "bbox": [left, top, right - left, bottom - top]}

    def _picture(self, image: ImageBoxes) -> bytes:
        path = self._split.path(image)
        try:
            return path.read_bytes()
        except OSError as error:
            raise HdovdError(
                f"image {image.id}: {path} cannot be read ({system_reason(error)}), but the cache has embeddings of "
                f"it: give the data that it was made from"
            ) from error

    def _arrays(self, image: ImageBoxes) -> dict[str, np.ndarray]:
        arrays = {}
        if Level.INSTANCE in self._levels:
            rows = self._cache.instances(image.id)
            found = {
                "box": rows.box,
                "source": rows.source,
                "score": rows.score,
                "annotation_id": rows.annotation_id,
                "embedding": rows.embedding,
                "noun": rows.noun,
                "noun_cosine": rows.noun_cosine,
            }
            found |= {"top_noun": rows.top_noun, "top_weight": rows.top_weight} if rows.top_noun.shape[1] else {}
            arrays = {
                name: found[array]
                for name, (level, array) in MEMBERS.items()
                if level in self._levels and level is not Level.IMAGE and array in found
            }
        if Level.IMAGE in self._levels:
            arrays["image"] = self._cache.image_embedding(image.id)
        return arrays


# --- from tar shards ---


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
    catalog = Catalog.create(cache)
    parts = {}
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
        parts[level] = _Parts(writer, meta)
    for level in TEXTS:
        if level in parts:
            parts[level].add({"embedding": meta.tensors[level]})
    for sample in _samples(shards, "writing", verify=False):
        for level in parts.keys() - set(TEXTS):
            arrays = {
                array: sample.arrays[name]
                for name, (of, array) in MEMBERS.items()
                if of is level and array in row_arrays(level, meta.attributes(level)["dim"])
            }
            parts[level].add({"embedding": arrays["embedding"][None]} if level is Level.IMAGE else arrays)
    for part in parts.values():
        if not part.product.whole:
            raise HdovdError(
                f"{url} holds too few rows of {part.product}: {len(part.product.missing())} parts are not full; export "
                f"again"
            )
    catalog.write_set(meta.name, meta.features)
    log(
        f"{cache}: set {meta.name} of {meta.images:,d} images, "
        f"{size(sum(part.product.bytes() for part in parts.values()))}"
    )
    return meta.features


def _samples(shards: TarShards, what: str, *, verify: bool) -> Iterator[TarSample]:
    with progress(None, what, "image", total=shards.images) as bar:
        for number in shards.numbers:
            for place, raw in shards.raw(number, verify=verify):
                yield shards.decode(place, raw)
                bar.update()


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


class _Parts:
    """Takes the rows of a product in order and writes each part when it is full, unless it is there."""

    def __init__(self, writer: ProductWriter, meta: TarMeta) -> None:
        """Raises HdovdError if the product is there in part, and its parts are of another size."""
        self.product, self._writer, self._at = writer.product, writer, 0
        self._failed, self._records = (
            meta.failed_parts(self.product.level),
            meta.products[self.product.level]["records"],
        )
        self._finished, self._pending = self.product.finished(), dict[str, np.ndarray]()
        exported = meta.attributes(self.product.level)["part_rows"]
        if self.product.part_rows != exported and not self.product.whole:
            raise HdovdError(
                f"{self.product.folder.url} has some of {self.product}, in parts of {self.product.part_rows} rows, the "
                f"shards are of parts of {exported}: give another --cache, or finish the extraction"
            )
        self._compare(TABLES)

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """(n, ...) more rows of every row array; nothing for a level that has none."""
        count, taken = len(next(iter(arrays.values()), ())), 0
        while taken < count:
            part = self._at // self.product.part_rows
            start, stop = self.product.rows_of(part)
            some = min(count - taken, stop - self._at)
            if part not in self._finished:
                for name, rows in arrays.items():
                    if name not in self._pending:
                        self._pending[name] = np.empty((stop - start, *rows.shape[1:]), rows.dtype)
                    self._pending[name][self._at - start : self._at - start + some] = rows[taken : taken + some]
            self._at, taken = self._at + some, taken + some
            if self._at == stop and part not in self._finished:
                self._writer.write_part(part, self._pending, self._failed[part])
                self._pending = {}
                self._compare(part)

    def _compare(self, part: int | str) -> None:
        """Raises HdovdError if the bytes of a part are not those that were exported; metadata may be of another version
        of Zarr.
        """
        found = json.loads(self.product.folder.read(self.product.record_name(part)))["objects"]
        exported = self._records[str(part)]["objects"]
        wrong = [name for name in found if not name.endswith("zarr.json") and found[name] != exported.get(name)]
        if wrong:
            raise HdovdError(
                f"{self.product.folder.url}: {wrong[0]} of {self.product} is not what was exported: were the shards "
                f"changed? Delete {self.product.prefix} in the cache, and import shards that hdovd exported"
            )
