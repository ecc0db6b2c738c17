"""What `hdovd cache verify` is asked to check, and what a set of features was made from. Imports no CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.open import open_folder
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.source import extraction_of, laid_over


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """What to check. `features`: one set, or None for all products. `sample`: rows of a level to encode again, with `seed`.

    `repair`: mark what is damaged as missing. `changes`: fields of `ExtractConfig` to lay over what a set was made from, where data or
    CLIP lie elsewhere now.
    """

    cache: Path | str
    features: str | None = None
    sample: int = 0
    seed: int = 0
    repair: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises HdovdError if there is no cache, not even a damaged one, or tar shards are to be repaired."""
        if is_tar_form(self.cache):
            if self.sample or self.repair:
                raise HdovdError(f"{self.cache} is of tar shards: --sample and --repair need the Zarr cache that they were exported from")
            return
        folder = open_folder(self.cache)
        if not folder.exists("zarr.json") and not any(folder.sizes(level) for level in Level):
            Catalog(self.cache)  # says so


def settings_of(config: CheckConfig, name: str, features: FeatureSet) -> ExtractConfig:
    """The extraction that a set came from, with the changes asked for. Raises HdovdError if it is not known."""
    changes = dict(config.changes)
    given: DataPaths = changes.pop("data", DataPaths())
    if "clip" in changes:
        changes.setdefault("pretrained", None)
    if not features.made_from and "clip" in changes and given != DataPaths():
        return ExtractConfig(given, config.cache, **changes)
    settings = extraction_of(features, config.cache, name, "the options of its hdovd extract-clip command, --data, --clip and what else it "
                             "had", **changes)
    return replace(settings, data=laid_over(given, settings.data))
