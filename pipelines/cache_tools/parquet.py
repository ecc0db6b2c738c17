"""The boxes of a cache as one Parquet file, for whatever reads tables: DuckDB, pandas, Polars, LanceDB, Embedding
Atlas.

A row a box, image by image, base boxes before proposals. Columns; null means that a value is not known or does not
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

from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.pipelines.cache_tools.config import ParquetConfig
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.console import progress, size
from hdovd.pipelines.extraction.source import CacheSource, CacheWithData, with_data

GROUP_ROWS = 16_384  # of a row group, which is held in memory: 32 MB of embeddings of 512 values


def export_parquet(config: ParquetConfig) -> None:
    """Write the file whole or not at all. Raises HdovdError for bad input, or without pyarrow."""
    config.check()
    try:
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise HdovdError("hdovd cache export --to parquet needs pyarrow: pip install 'hdovd[parquet]'") from error
    cache = FeatureCache(config.source.cache, config.source.features)
    table, images = _Table(cache, _data(cache, config.source)), cache.row_images()

    def write(partial: Path) -> None:
        # A float16 in float32 has two bytes of next to nothing: split from the others they take next to no room.
        with (
            ParquetWriter(
                partial,
                table.of(images[:0], 0).schema,
                compression="zstd",
                use_dictionary=["file_name", "source", "name"],
                column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"},
            ) as writer,
            progress(None, "parquet", "box", total=len(images)) as bar,
        ):
            for start in range(0, len(images), GROUP_ROWS):
                writer.write_table(table.of(images[start : start + GROUP_ROWS], start))
                bar.update(min(GROUP_ROWS, len(images) - start))

    replace_file(config.out, write)
    log(f"wrote {config.out}: {len(images):,d} boxes, {size(config.out.stat().st_size)}")


def _data(cache: FeatureCache, source: CacheSource) -> CacheWithData | None:
    """The annotations; None, and a note, if nobody named them and they are not where the set was made from."""
    try:
        return with_data(cache, source)
    except HdovdError as error:
        if source.data is not None or source.protocol is not None:
            raise
        log(f"note: there are no file names, and base boxes have no class name: {error}")
        return None


class _Table:
    """Makes pyarrow tables of a cache's rows."""

    def __init__(self, cache: FeatureCache, data: CacheWithData | None) -> None:
        self._cache, self._files, self._classes = cache, dict[int, str](), dict[int, str]()
        self._nouns = cache.names(Level.NOUN) if Level.NOUN in cache.levels() else []
        if data is not None:
            self._files = {image.id: image.file_name for image in data.split.images}
            self._classes = {
                number: data.protocol.names[label]
                for image in data.split.images
                for number, label in zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
            }

    def of(self, images: np.ndarray, start: int) -> Any:
        """The rows from `start` on, which are of `images` (n,)."""
        import pyarrow as pa

        rows = self._cache.rows_between(start, start + len(images))
        base, unread = rows.source == Source.BASE_BOX, ~rows.embedding.any(axis=1)
        names = [
            self._nouns[noun] if noun >= 0 else self._classes.get(number)
            for noun, number in zip(rows.noun.tolist(), rows.annotation_id.tolist(), strict=True)
        ]
        left, top, right, bottom = rows.box.T
        return pa.table(
            {
                "image_id": images,
                "file_name": pa.array([self._files.get(image) for image in images.tolist()], pa.string()),
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
                    rows.embedding.astype(np.float32).ravel(), self._cache.dim, mask=pa.array(unread)
                ),
            }
        )
