"""The features that a run was trained from, found again by the keys that it recorded. Called by the parts of `report`."""

from __future__ import annotations

from typing import Any

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.reader import FeatureCache
from hdovd.coco import DataPaths
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.extract_config import ExtractConfig


def cache_of(record: dict[str, Any]) -> FeatureCache:
    """The cache of a run's record, with the very products of then. Raises HdovdError if they are not there any more."""
    where, name, _ = _find(record)
    return FeatureCache(where, name)


def data_of_cache(record: dict[str, Any]) -> DataPaths:
    """Where the data lay that the run's features were made from. Raises HdovdError if that is not known."""
    where, name, features = _find(record)
    if not features.made_from:
        raise HdovdError(f"set {name} of {where} does not say which data it was made from")
    try:
        return ExtractConfig.from_dict(features.made_from, where).data
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HdovdError(f"set {name} of {where}: made_from is damaged ({error!r})") from error


def _find(record: dict[str, Any]) -> tuple[str, str, FeatureSet]:
    """The cache's place, and the set with the run's keys."""
    if "imported" in record:
        raise HdovdError("the run was imported from a checkpoint, so there is no cache that it was trained from")
    cache = record.get("cache") or {}
    where, levels = cache.get("path"), cache.get("levels")
    if not where or not levels:
        raise HdovdError("the run does not say which cache it was trained from")
    if is_tar_form(where):
        raise HdovdError(f"it was trained from the tar shards {where}, which are read from first to last alone: this needs the Zarr cache")
    keys, sets = {level: entry["key"] for level, entry in levels.items()}, Catalog(where).sets()
    for name, features in sets.items():
        if {str(level): key for level, key in features.levels.items()} == keys:
            return str(where), name, features
    raise HdovdError(f"{where} has no set of features with the products that the run was trained from "
                     f"({'it has ' + shorten(list(sets)) if sets else 'it has no sets'})")
