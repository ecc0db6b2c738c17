"""What `hdovd cache view`, `verify` and `import` are asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hdovd.cache import SET_NAME_TOLD, Catalog, FeatureSet, Level, is_set_name, is_tar_form
from hdovd.cache.store import open_folder
from hdovd.core import HdovdError, require_files
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.calibration.values import read_calibration
from hdovd.pipelines.common.options import (
    DATA,
    OTHER_PROTOCOL,
    SET,
    CacheArgument,
    CacheWritten,
    Calibration,
    FeaturesOptions,
    Group,
    Option,
    Precision,
    Pretrained,
    data_if_given,
    read_recipe,
)
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES, ActivationOption, Compute, ExtractConfig
from hdovd.pipelines.extraction.source import CacheSource, extraction_of, laid_over
from hdovd.pipelines.teachers.base import Activation, Templates, check_templates

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


def _recipe(given: dict[str, Any]) -> Recipe | None:
    if given["recipe"] is None and given["set_"]:
        raise HdovdError("--set lays values over a recipe: give --recipe too")
    return None if given["recipe"] is None else read_recipe(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig(CacheSource):
    """`images`: ids, or `random` or `random:N`; empty: the first that has rows. `seed`: which random ones.

    `out`: a PNG, or a folder for IMAGEID.png. `calibration`, `recipe`: where weights are from; None: those known for
    the cache's CLIP.
    """

    images: Annotated[
        tuple[str, ...],
        Group(
            {
                "image": (
                    list[str] | None,
                    None,
                    Option(
                        "An image id, repeatable or with commas between; random, random:5. Default: the first image "
                        "that has boxes.",
                        metavar="ID",
                    ),
                )
            },
            lambda given: tuple(
                word.strip() for words in given["image"] or () for word in words.split(",") if word.strip()
            ),
        ),
    ] = ()
    out: Annotated[Path, Option("The PNG to write, or a folder for ID.png. Default: ID.png in this folder.")] = Path()
    calibration: Calibration = None
    recipe: Annotated[
        Recipe | None,
        Group(
            {
                "recipe": (str | None, None, Option("Take the weights of this recipe, shipped or a TOML file.")),
                "set_": (list[str] | None, None, SET),
            },
            _recipe,
        ),
    ] = None
    seed: Annotated[int, Option("Which images random takes.")] = 0

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix not in ("", ".png"):
            raise HdovdError(f"--out {self.out}: expected a name that ends in .png, or a folder")
        CacheSource.check(self)
        if self.calibration is not None:
            read_calibration(self.calibration)


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
        try:
            Catalog(self.cache)
        except HdovdError as error:  # a cache whose root is damaged is one
            folder = open_folder(self.cache)
            if (error.__cause__ is None and folder.exists("zarr.json")) or not any(map(folder.sizes, Level)):
                raise


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


class ForeignFormat(StrEnum):
    HD_OVD = "hd-ovd"
    OADP = "oadp"
    WEBDATASET = "webdataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig(FeaturesOptions):
    """An import of features that others made. `clip`: embeds the class names; None for no class level."""

    format: Annotated[
        ForeignFormat,
        Option(
            "hd-ovd or oadp: embeddings that their authors published; webdataset: tar shards, which "
            "become the cache again that they were exported from; no other option is read."
        ),
    ]
    source: Annotated[Path | str, Option("The folder to import; of tar shards also s3://, gs://.", argument=True)]
    cache: CacheWritten
    proposals: Annotated[Path | None, Option("With hd-ovd: the .pkl of boxes that the files go with.")] = None
    clip: Annotated[str | None, Option("The CLIP that the publishers used: embeds the class names.")] = None
    pretrained: Pretrained = None
    templates: Templates = DEFAULT_TEMPLATES
    precision: Compute = Precision.AUTO
    activation: ActivationOption = Activation.AUTO

    def __post_init__(self) -> None:
        check_templates(self.templates)
        if self.format is not ForeignFormat.WEBDATASET and (self.format is ForeignFormat.HD_OVD) != (
            self.proposals is not None
        ):
            raise HdovdError(
                "--format hd-ovd needs --proposals, the .pkl of boxes that its files go with; --format oadp takes none"
            )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.format is ForeignFormat.WEBDATASET:
            return
        if not is_set_name(self.features):
            raise HdovdError(f"--features {self.features[:100]!r}: expected {SET_NAME_TOLD}")
        load_protocol(self.protocol)
        self.data.locate("train2017")
        require_files(proposals=self.proposals)
        if not Path(self.source).is_dir():
            raise HdovdError(f"{self.source}: no such folder")
        Catalog.find_at(self.cache)
