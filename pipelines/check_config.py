"""What `hdovd cache verify` is asked to check, and what a set of features was made from. Imports no CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.cache.catalog import Catalog, is_tar_form
from hdovd.cache.schema import Level
from hdovd.cache.storage import open_folder
from hdovd.coco import DataPaths
from hdovd.errors import HdovdError
from hdovd.pipelines.extract_config import ExtractConfig

if TYPE_CHECKING:
    from hdovd.pipelines.teacher import Teacher


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """What to check. `features`: one set, or None for all products. `sample`: rows of a level to encode again, with `seed`.

    `changes`: fields of `ExtractConfig` to lay over what a set was made from, where data or CLIP lie elsewhere now.
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


class Clips:
    """Loads each CLIP once; `given`: use this one instead."""

    def __init__(self, given: Teacher | None) -> None:
        self._given = given
        self._loaded: dict[tuple[Any, ...], Teacher] = {}

    def of(self, config: ExtractConfig) -> Teacher:
        key = config.clip, config.pretrained, config.precision, config.activation, config.device
        if self._given is None and key not in self._loaded:
            from hdovd.pipelines.clip_teacher import load_clip

            self._loaded[key] = load_clip(config.clip, config.pretrained, device=config.device, precision=config.precision,
                                          activation=config.activation)
        return self._given or self._loaded[key]


@contextmanager
def told_where(name: str) -> Iterator[None]:
    """Adds to an error of reading the data or the CLIP which set named them, and what to do."""
    try:
        yield
    except HdovdError as error:
        raise HdovdError(f"{error}\nSet {name} was made from this. If it lies elsewhere now, say where: --data (or --images, "
                         "--annotations), --clip, --proposals, --vocabulary, --captions, --nouns, --synonyms, --class-embeddings, "
                         "--protocol") from error


def settings_of(config: CheckConfig, name: str, made_from: dict[str, Any]) -> ExtractConfig:
    """The extraction that a set came from, with the changes asked for. Raises HdovdError if it is not known."""
    changes = {"features": name, **config.changes}
    given: DataPaths = changes.pop("data", DataPaths())
    if "clip" in changes:
        changes.setdefault("pretrained", None)
    if not made_from and (not {"clip"} <= changes.keys() or given == DataPaths()):
        raise HdovdError(f"{config.cache}: it is not known what set {name} was made from (it is damaged, or was imported): give the "
                         "options of its hdovd extract-clip command: --data, --clip and what else it had")
    try:
        if not made_from:
            return ExtractConfig(given, config.cache, **changes)
        settings = ExtractConfig.from_dict(made_from, config.cache, **changes)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HdovdError(f"{config.cache}/sets/{name}.json: made_from is damaged ({error!r}): give --data, --clip and what else the "
                         "hdovd extract-clip command had") from error
    if given == DataPaths():
        return settings
    if given.root is not None:
        return replace(settings, data=given)
    return replace(settings, data=DataPaths(settings.data.root, given.images or settings.data.images,
                                            given.annotations or settings.data.annotations))
