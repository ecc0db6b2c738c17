"""A cache opened together with the annotations and pictures that it was made from. Called by `view_images` and `cache_map`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.coco import DataPaths, Exif, ImageBoxes, Split
from hdovd.errors import HdovdError
from hdovd.pipelines.cache_jobs import CacheSource
from hdovd.pipelines.extract_config import ExtractConfig
from hdovd.pipelines.identities import exif_of, inputs_of
from hdovd.protocol import Protocol, load_protocol


@dataclass(frozen=True, slots=True)
class CacheWithData:
    """`images`: the split's by id."""

    cache: FeatureCache
    split: Split
    protocol: Protocol
    images: dict[int, ImageBoxes]


def with_data(cache: FeatureCache, source: CacheSource, log: Callable[[str], None]) -> CacheWithData:
    """The data of an opened set. Raises HdovdError if they are not known, not there, or not those that the set was made from."""
    where = f"set {source.features} of {source.cache}"
    data, protocol_name = _named(cache, source, where)
    exif = exif_of({level: cache.key_inputs(level) for level in cache.levels()}) or Exif.APPLY
    try:
        protocol = load_protocol(protocol_name)
        split = data.load("train2017", protocol, base_only=True, log=log, exif=exif)
    except HdovdError as error:
        if source.data is not None and source.protocol is not None:
            raise
        raise HdovdError(f"{error}\nThis is what {where} was made from. If it lies elsewhere now, say where: --data (or --images, "
                         "--annotations), --protocol") from error
    cache.require(Level.BOXES, {"images": inputs_of(split, cache)[Level.BOXES]["images"]})
    return CacheWithData(cache, split, protocol, {image.id: image for image in split.images})


def _named(cache: FeatureCache, source: CacheSource, where: str) -> tuple[DataPaths, str]:
    """Paths of the data and the name or file of the protocol."""
    if not cache.set.made_from:
        if source.data is None or source.protocol is None:
            raise HdovdError(f"{where} does not say which data it was made from (it was imported): give --data and --protocol")
        return source.data, source.protocol
    try:
        extraction = ExtractConfig.from_dict(cache.set.made_from, source.cache)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HdovdError(f"{where}: made_from is damaged ({error!r}): give --data and --protocol, or mend it with hdovd cache verify "
                         "--repair") from error
    given, protocol = source.data or DataPaths(), source.protocol or extraction.protocol
    if given.root is not None:
        return given, protocol
    then = extraction.data
    return DataPaths(then.root, given.images or then.images, given.annotations or then.annotations), protocol
