"""All images and boxes of an extraction as one table: the row order of every level that has a row a box or an image.

N images, M boxes: image by image in file order, base boxes before proposals, proposals best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hdovd.cache.identity import KeyInputs, box_inputs, image_inputs, source_inputs
from hdovd.cache.schema import TABLE_ARRAYS, Level, Source
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.extraction.picture_hashes import image_hash
from hdovd.pipelines.proposal_files.file import NO_PROPOSALS, Proposals


@dataclass(frozen=True, slots=True)
class BoxTable:
    """image_id (N,) i64, image_hash (N,) u64 (see `picture_hashes`), image_size (N, 2) i32, offset (N+1,) i64; box (M,
    4) f32 xyxy pixels, source (M,) u8, score (M,) f32, annotation_id (M,) i64.
    """

    image_id: np.ndarray
    image_hash: np.ndarray
    image_size: np.ndarray
    offset: np.ndarray
    box: np.ndarray
    source: np.ndarray
    score: np.ndarray
    annotation_id: np.ndarray

    def tables(self, level: Level) -> dict[str, np.ndarray]:
        """The tables that a level's product holds."""
        return {name: getattr(self, name) for name in TABLE_ARRAYS[level]}

    def image_inputs(self) -> KeyInputs:
        return image_inputs(self.tables(Level.BOXES))

    def box_inputs(self) -> KeyInputs:
        return box_inputs(self.tables(Level.BOXES))

    def base_box_inputs(self) -> KeyInputs:
        return source_inputs(self.tables(Level.BOXES), Source.BASE_BOX)

    def proposal_inputs(self) -> KeyInputs:
        return source_inputs(self.tables(Level.BOXES), Source.PROPOSAL)

    def images_of(self, start: int, stop: int) -> range:
        """The images that have rows between `start` and `stop`."""
        if stop <= start:
            return range(0)
        first = int(np.searchsorted(self.offset, start, "right")) - 1
        return range(first, int(np.searchsorted(self.offset, stop, "left")))


def box_table(
    images: Sequence[ImageBoxes], proposals: dict[int, Proposals], hashes: np.ndarray | None = None
) -> BoxTable:
    """The table of all base boxes and proposals. hashes: None for those of images that no cache has another picture
    of."""
    found = [proposals.get(i.id, NO_PROPOSALS) for i in images]
    counts = np.array([(len(i.boxes), len(p.boxes)) for i, p in zip(images, found, strict=True)], np.int64).reshape(
        -1, 2
    )
    source = np.repeat(np.tile(np.array([Source.BASE_BOX, Source.PROPOSAL], np.uint8), len(images)), counts.reshape(-1))
    base, extra = source == Source.BASE_BOX, source == Source.PROPOSAL
    box, score, annotation_id = (
        np.zeros((len(source), 4), np.float32),
        np.ones(len(source), np.float32),
        np.full(len(source), -1, np.int64),
    )
    if len(images):
        box[base], box[extra] = np.concatenate([i.boxes for i in images]), np.concatenate([p.boxes for p in found])
        score[extra] = np.concatenate([p.scores for p in found])
        annotation_id[base] = np.concatenate([i.annotation_ids for i in images])
    return BoxTable(
        image_id=np.array([i.id for i in images], np.int64),
        image_hash=np.array([image_hash(i) for i in images], np.uint64) if hashes is None else hashes,
        image_size=np.array([(i.width, i.height) for i in images], np.int32).reshape(-1, 2),
        offset=np.concatenate([[0], np.cumsum(counts.sum(axis=1))]).astype(np.int64),
        box=box,
        source=source,
        score=score,
        annotation_id=annotation_id,
    )


def match_rows(wanted: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> np.ndarray:
    """For every row of the columns `wanted` the row of the columns `have` with the same bytes, or -1: (rows,) int64."""
    a, b = _row_bytes(wanted), _row_bytes(have)
    if not len(a) or not len(b):
        return np.full(len(a), -1, np.int64)
    codes_a, codes_b = _mixed(a), _mixed(b)
    order = np.argsort(codes_b, kind="stable")
    at = np.minimum(np.searchsorted(codes_b[order], codes_a), len(b) - 1)
    found = order[at]
    same: np.ndarray = (a == b[found]).all(axis=1)  # whatever the codes say
    return np.where(same, found, -1)


def _row_bytes(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Columns (n, ...) of 4 or 8 bytes a value as (n, w) uint32."""
    return np.concatenate(
        [
            np.ascontiguousarray(c).view(np.uint32).reshape(len(c), -1) if len(c) else np.zeros((0, 1), np.uint32)
            for c in columns
        ],
        axis=1,
    )


def _mixed(rows: np.ndarray) -> np.ndarray:
    """A 64-bit code a row."""
    code = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        code = (code ^ column) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
    return code
