"""`hdovd cache map`: instance embeddings as points in a plane, as a PNG and as one page of HTML that needs no network.

Called by the command line. `map_points` samples and measures, `map_picture` and `map_page` draw. scikit-learn projects: PCA to 50 values,
then t-SNE, which keeps near what is near. UMAP would bring numba, and a compiler at run time, for a picture of the same use. n points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hdovd.cache.reader import FeatureCache
from hdovd.core.errors import HdovdError
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.cache_tools.config import Colour, MapConfig
from hdovd.pipelines.cache_tools.map_points import MapNumbers, MapPoints, measure, take_points
from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.extraction.source import CacheSource, CacheWithData, with_data

PCA_VALUES = 50
PERPLEXITY = 30
FEW = 5  # points: below, t-SNE has nothing to do


@dataclass(frozen=True, slots=True, eq=False)
class CacheMap:
    """`seen` (n, 2) float: places in the picture, 0..1, y upwards. `pictures`: where the crops are from, None if that is not known."""

    config: MapConfig
    points: MapPoints
    seen: np.ndarray
    numbers: MapNumbers
    pictures: CacheWithData | None

    def groups(self, colour: Colour) -> list[str]:
        """What gives each point its colour; "" for none."""
        points, base = self.points, self.points.base.tolist()
        if colour is Colour.NEAREST:
            return points.nearest
        if colour is Colour.SOURCE:
            return ["base box" if own else "proposal" for own in base]
        wanted = {Colour.NAME: (True, False), Colour.CLASS: (True,), Colour.NOUN: (False,)}[colour]
        return [name if own in wanted else "" for name, own in zip(points.name, base, strict=True)]


def map_cache(config: MapConfig, log: Callable[[str], None] = print) -> CacheMap:
    """Project, write the page and the picture, print the figures. Raises HdovdError for bad input, or without scikit-learn."""
    config.check()
    require_sklearn()
    cache = FeatureCache(config.source.cache, config.source.features)
    found = _data(cache, config.source, log)
    images: dict[int, ImageBoxes] = {} if found is None else found.images
    names, base = ((), ()) if found is None else (found.protocol.names, found.protocol.base)
    points = take_points(cache, config.points, config.seed, images, names, base)
    if not points.name:
        raise HdovdError(f"set {config.source.features} of {config.source.cache} has no embedding of any box to show ({points.rows} rows)")
    if points.left_out:
        log(f"left out: {points.left_out} rows without an embedding, of images that could not be read")
    log(f"projecting {len(points.name):,d} of {points.rows:,d} rows")
    seen = project(points.embedding, config.seed)
    result = CacheMap(config, points, seen, measure(points, seen), found)
    for line in result.numbers.lines(points.rows):
        log(line)
    _write(result, log)
    return result


def project(embedding: np.ndarray, seed: int) -> np.ndarray:
    """embedding (n, D) -> places (n, 2) float64 within 0..1; the same for the same input and seed."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count = len(embedding)
    centred = embedding.astype(np.float64) - embedding.mean(axis=0, dtype=np.float64)
    if count < FEW or embedding.shape[1] < 2 or not centred.any():
        places = np.zeros((count, 2))
        width = min(2, count, embedding.shape[1])
        if centred.any():
            places[:, :width] = PCA(width, svd_solver="full").fit_transform(centred)
    else:
        reduced = PCA(min(PCA_VALUES, count, embedding.shape[1]), svd_solver="full").fit_transform(centred)
        places = TSNE(2, perplexity=min(PERPLEXITY, (count - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)
    low, high = places.min(axis=0), places.max(axis=0)
    size = max(float((high - low).max()), 1e-12)
    return np.asarray((places - (low + high) / 2) / size + 0.5, np.float64)


def require_sklearn() -> None:
    """Raises HdovdError if scikit-learn or Jinja2 is not there."""
    try:
        import jinja2  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise HdovdError(f"hdovd cache map needs {error.name}: pip install 'hdovd[map]'") from error


def _data(cache: FeatureCache, source: CacheSource, log: Callable[[str], None]) -> CacheWithData | None:
    """The annotations, which know the classes of base boxes; None, and said so, if nobody named them and they are not where they were."""
    try:
        return with_data(cache, source, log)
    except HdovdError as error:
        if source.data is not None or source.protocol is not None:
            raise
        log(f"note: base boxes have no class name, and there are no thumbnails: {error}")
        return None


def _write(result: CacheMap, log: Callable[[str], None]) -> None:
    from hdovd.pipelines.cache_tools.map_page import page_of
    from hdovd.pipelines.cache_tools.map_picture import draw_map

    out = result.config.out
    page, picture = page_of(result, log), out.with_suffix(".png")
    write_picture(picture, draw_map(result), "PNG")
    write_text(out, page)
    log(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB, opens in any browser) and {picture}")
