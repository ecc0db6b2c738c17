"""What `hdovd cache verify` is asked to check, and what a set of features was made from. Imports no CLIP."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.open import open_folder
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths
from hdovd.pipelines.common.options import DATA, OTHER_PROTOCOL, CacheArgument, Group, Option, data_if_given
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.source import extraction_of, laid_over
from hdovd.pipelines.teachers.activation import Activation


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    names = ("clip", "pretrained", "protocol", "precision", "activation", "device")
    found = {"data": data_if_given(given), **{name: given[name] for name in names}}
    return {name: value for name, value in found.items() if value not in (None, Precision.AUTO)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """A check of a cache. `changes`: fields of `ExtractConfig` to lay over what a set was made from, where data or CLIP
    are elsewhere now.
    """

    cache: CacheArgument
    features: Annotated[str | None, Option("Check one set alone. Default: all products.")] = None
    sample: Annotated[int, Option("Encode N rows of images and boxes again.", min=0, metavar="N")] = 0
    seed: Annotated[int, Option("Which rows --sample takes.")] = 0
    repair: Annotated[bool, Option("Mark what is damaged as missing: extract-clip makes it again.")] = False
    changes: Annotated[
        dict[str, Any],
        Group(
            {
                **DATA,
                "clip": (str | None, None, Option("The CLIP that the cache was made with, if it is elsewhere now.")),
                "pretrained": (str | None, None, Option("Tag or checkpoint file, with a model name.")),
                "protocol": (str | None, None, OTHER_PROTOCOL),
                "precision": (
                    Precision,
                    Precision.AUTO,
                    Option("What CLIP computes in, for --sample. Default: what the cache was made in."),
                ),
                "activation": (Activation | None, None, Option("The activation that the weights were trained with.")),
                "device": (str, "auto", Option("auto, cpu or cuda.")),
            },
            _changes,
        ),
    ] = field(default_factory=dict)

    def check(self) -> None:
        """Raises HdovdError if there is no cache, not even a damaged one, or tar shards are to be repaired."""
        if is_tar_form(self.cache):
            if self.sample or self.repair:
                raise HdovdError(
                    f"{self.cache} is of tar shards: --sample and --repair need the Zarr cache that they were exported "
                    f"from"
                )
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
        return ExtractConfig(data=given, cache=config.cache, **changes)
    settings = extraction_of(
        features,
        config.cache,
        name,
        "the options of its hdovd extract-clip command, --data, --clip and what else it had",
        **changes,
    )
    return replace(settings, data=laid_over(given, settings.data))
