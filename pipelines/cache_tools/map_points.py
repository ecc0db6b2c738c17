"""A sample of a cache's instance rows, to be seen as points: what they are called, and how far that can be trusted.

Called by `cache_map`. n points, D embedding size, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.cache.schema import Level, Source
from hdovd.data.coco import ImageBoxes

NEIGHBOURS = 10
ROWS_AT_ONCE = 512  # compared with all others at a time
BLOCK_ROWS = 256  # read together where a row costs as much as its neighbours too


@dataclass(frozen=True, slots=True, eq=False)
class MapPoints:
    """Rows of the instance level, in row order.

    embedding (n, D) float32 of norm one, image (n,) int64, box (n, 4) float32 xyxy pixels, source (n,) uint8, score (n,) float32.
    `name`: the class of a base box, the noun of a proposal; "" if it has none. cosine (n,) float32 of crop and name, nan where there is
    none. `nearest`: the most similar class name, "" if the cache has none; nearest_cosine (n,) float32. `nearest_base`: the same among
    the classes of base boxes. `left_out`: rows of the sample that have no embedding. `rows`: how many the cache has.
    """

    embedding: np.ndarray
    image: np.ndarray
    box: np.ndarray
    source: np.ndarray
    score: np.ndarray
    name: list[str]
    cosine: np.ndarray
    nearest: list[str]
    nearest_cosine: np.ndarray
    nearest_base: list[str]
    left_out: int
    rows: int

    @property
    def base(self) -> np.ndarray:
        """(n,) bool."""
        return np.asarray(self.source == Source.BASE_BOX)


def sample_rows(rows: int, count: int, seed: int, *, in_blocks: bool = False) -> np.ndarray:
    """Ascending numbers of `count` rows out of `rows`, all if there are no more. `in_blocks`: runs of `BLOCK_ROWS`, which cost less to
    read where a chunk has to be decoded for each row."""
    draw = np.random.default_rng(seed)
    if count >= rows:
        return np.arange(rows)
    if not in_blocks:
        return np.sort(draw.choice(rows, count, replace=False))
    blocks = np.sort(draw.choice(-(-rows // BLOCK_ROWS), min(-(-count // BLOCK_ROWS) + 1, -(-rows // BLOCK_ROWS)), replace=False))
    found = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
    return np.asarray(found[found < rows][:count])


def take_points(cache: FeatureCache, count: int, seed: int, images: Mapping[int, ImageBoxes], names: Sequence[str], base: Sequence[str]
                ) -> MapPoints:
    """A sample. `images` and `names`: the annotations, and the protocol's names by label; empty: base boxes have no name. `base`: its base
    classes."""
    chosen = sample_rows(cache.row_count(), count, seed, in_blocks=cache.reads_best_in_blocks)
    image, rows = cache.instances_at(chosen)
    there = np.asarray(rows.embedding.any(axis=1))
    image, rows = image[there], rows.select(there)
    crops = normalised_rows(rows.embedding)
    levels = cache.levels()
    classes = cache.names(Level.CLASS) if Level.CLASS in levels else []
    texts = normalised_rows(cache.embeddings(Level.CLASS)) if classes else np.zeros((0, crops.shape[1]), np.float32)
    nouns = cache.names(Level.NOUN) if Level.NOUN in levels else []
    own = [""] * len(crops)
    for k, (number, source) in enumerate(zip(image.tolist(), rows.source.tolist(), strict=True)):
        if source == Source.PROPOSAL:
            own[k] = nouns[rows.noun[k]] if nouns and rows.noun[k] >= 0 else ""
        elif number in images:
            at = np.flatnonzero(images[number].annotation_ids == rows.annotation_id[k])
            own[k] = names[images[number].labels[at[0]]] if len(at) else ""
    likeness = crops @ texts.T
    cosine = np.where(rows.noun >= 0, rows.noun_cosine, np.nan).astype(np.float32)
    column = {name: k for k, name in enumerate(classes)}
    for k in np.flatnonzero(rows.source == Source.BASE_BOX).tolist():
        cosine[k] = likeness[k, column[own[k]]] if own[k] in column else np.nan
    bases = [k for k, name in enumerate(classes) if name in set(base)]
    nameless = [""] * len(crops)
    nearest = [classes[k] for k in likeness.argmax(axis=1)] if classes else nameless
    nearest_base = [classes[bases[k]] for k in likeness[:, bases].argmax(axis=1)] if bases else nameless
    highest = likeness.max(axis=1) if classes else np.full(len(crops), np.nan, np.float32)
    return MapPoints(crops, image, rows.box, rows.source, rows.score, own, cosine, nearest, highest, nearest_base, int((~there).sum()),
                     cache.row_count())


def nearest_neighbours(points: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    """The nearest other points by distance: points (n, d) -> (n, min(count, n - 1)) int64, nearest first."""
    k = max(0, min(count, len(points) - 1))
    found = np.zeros((len(points), k), np.int64)
    wide, square = points.astype(np.float64), (points.astype(np.float64) ** 2).sum(axis=1)
    for start in range(0, len(points) if k else 0, ROWS_AT_ONCE):
        some = wide[start : start + ROWS_AT_ONCE]
        distance = square - 2 * some @ wide.T
        distance[np.arange(len(some)), start + np.arange(len(some))] = np.inf
        near = np.argpartition(distance, k - 1, axis=1)[:, :k]
        found[start : start + len(some)] = np.take_along_axis(near, np.take_along_axis(distance, near, 1).argsort(axis=1), 1)
    return found


@dataclass(frozen=True, slots=True)
class MapNumbers:
    """Whether the picture can be trusted. Shares in 0..1, None where there is nothing to count.

    `named`, `named_among_base`: of base boxes, those whose nearest class text is their class, among all classes and among base classes.
    `pure`, `pure_seen`, `pure_by_chance`: how many of the 10 nearest points have the same name, in the embeddings, in the picture, and of
    points taken at random; by kind, "base boxes" and "proposals", among points of that kind that have a name. `kept`: how many of the 10
    nearest in the embeddings are among the 10 nearest in the picture.
    """

    points: int
    base: int
    named: float | None
    named_among_base: float | None
    pure: dict[str, tuple[int, float, float, float]]
    kept: float | None

    def lines(self, rows: int) -> list[str]:
        """In words, for a terminal and the page."""
        lines = [f"figures over {self.points:,d} sampled rows of {rows:,d} ({self.base:,d} base boxes):"]
        if self.named is not None and self.named_among_base is not None:
            lines.append(f"  {self.named:.1%} of base boxes are most like the text of their own class, among all class names "
                         f"({self.named_among_base:.1%} among base names)")
        near = f"of the {NEIGHBOURS} nearest neighbours"
        for kind, (count, here, seen, chance) in self.pure.items():
            lines.append(f"  {here:.1%} {near} of {kind} have the same name in the embeddings, {seen:.1%} in the picture, {chance:.1%} by "
                         f"chance ({count:,d} {kind} with a name, each among its kind)")
        if self.kept is not None:
            lines.append(f"  {self.kept:.1%} {near} in the embeddings are among those in the picture: what lies near each other is alike, "
                         "but distances between groups mean little")
        return lines


def measure(points: MapPoints, seen: np.ndarray) -> MapNumbers:
    """seen (n, 2): where the points are in the picture."""
    known = points.base & np.array([bool(name) for name in points.name], bool) & np.array([bool(n) for n in points.nearest], bool)
    right = [(points.name[k] == points.nearest[k], points.name[k] == points.nearest_base[k]) for k in np.flatnonzero(known)]
    named, among_base = np.mean(right, axis=0).tolist() if right else (None, None)
    pure = {}
    for kind, mine in (("base boxes", points.base), ("proposals", ~points.base)):
        rows = np.flatnonzero(mine & np.array([bool(name) for name in points.name], bool))
        if len(rows) > 1:
            _, code, counts = np.unique([points.name[k] for k in rows], return_inverse=True, return_counts=True)
            chance = float((counts * (counts - 1)).sum() / (len(rows) * (len(rows) - 1)))
            pure[kind] = (len(rows), _purity(points.embedding[rows], code), _purity(seen[rows], code), chance)
    near, near_seen = nearest_neighbours(points.embedding), nearest_neighbours(seen)
    kept = float((near[:, :, None] == near_seen[:, None]).any(axis=2).mean()) if near.size else None
    return MapNumbers(len(points.name), int(points.base.sum()), named, among_base, pure, kept)


def _purity(points: np.ndarray, code: np.ndarray) -> float:
    return float((code[nearest_neighbours(points)] == code[:, None]).mean())
