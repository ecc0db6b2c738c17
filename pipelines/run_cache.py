"""The features that a run was trained from, found again by the keys that it recorded. Called by the parts of `report`."""

from __future__ import annotations

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.reader import FeatureCache
from hdovd.coco import DataPaths
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.extract_config import ExtractConfig
from hdovd.pipelines.run_folder import RunFolder


def cache_of(run: RunFolder) -> FeatureCache:
    """The cache that a run was trained from, with the very products of then. Raises HdovdError if they are not there any more."""
    where, name, _ = _find(run)
    return FeatureCache(where, name)


def data_of_cache(run: RunFolder) -> DataPaths:
    """Where the data lay that the run's features were made from. Raises HdovdError if that is not known."""
    where, name, features = _find(run)
    if not features.made_from:
        raise HdovdError(f"set {name} of {where} does not say which data it was made from")
    try:
        return ExtractConfig.from_dict(features.made_from, where).data
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HdovdError(f"set {name} of {where}: made_from is damaged ({error!r})") from error


def _find(run: RunFolder) -> tuple[str, str, FeatureSet]:
    """The cache's place, and the set with the run's keys."""
    record = run.record()
    if "imported" in record:
        raise HdovdError("the run was imported from a checkpoint, so there is no cache that it was trained from")
    where, levels = run.cache_url(), record["cache"]["levels"]
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
