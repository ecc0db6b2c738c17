"""What a cache's features were made from: the one answer for sets, for runs, and for commands that need the data again.

Imports no torch: the command line names a `CacheSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hdovd.cache import DEFAULT_SET, TAR_SAMPLES, Catalog, FeatureSet, Level, is_tar_form
from hdovd.core import HdovdError, shorten
from hdovd.data import DataPaths, Exif, Protocol, Split, load_protocol
from hdovd.data.forms.base import AUTO, FORMS
from hdovd.pipelines.common.options import MISSING, CacheArgument, DataIfGiven, Features, Group, Option, OtherProtocol
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.runs import RunFolder

if TYPE_CHECKING:
    from hdovd.cache.reader import FeatureCache

DATA_AND_PROTOCOL = "--data and --protocol"


class ExportForm(StrEnum):
    WEBDATASET = "webdataset"
    PARQUET = "parquet"
    LANCE = "lance"
    CROPS = "crops"


@dataclass(frozen=True)
class CacheSet:
    """A set of a cache."""

    cache: CacheArgument
    features: Features = DEFAULT_SET

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if is_tar_form(self.cache):
            raise HdovdError(
                f"{self.cache} is of tar shards: this needs the Zarr cache that they were made from, or one that hdovd "
                f"cache import --format webdataset makes of them"
            )
        Catalog(self.cache)


@dataclass(frozen=True, slots=True)
class CacheSource(CacheSet):
    """A set of a cache, and what it was made from. `data` and `protocol`: None for what the set says; parts of `data`
    count for themselves.
    """

    data: DataIfGiven = None
    protocol: OtherProtocol = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        CacheSet.check(self)
        if self.protocol is not None:
            load_protocol(self.protocol)
        if self.data is not None and self.data.root is not None:
            self.data.locate("train2017")

    def load(self, features: FeatureSet, exif: Exif = Exif.APPLY) -> tuple[Split, Protocol]:
        """The training images of the set and their protocol: those given, or else those that it was extracted from.
        Raises HdovdError.
        """
        data, name = self.data or DataPaths(), self.protocol
        if features.made_from or data == DataPaths() or name is None:
            extraction = extraction_of(features, self.cache, self.features)
            data, name = laid_over(data, extraction.data), name or extraction.protocol
        try:
            protocol = load_protocol(name)
            return data.load("train2017", protocol, base_only=True, exif=exif), protocol
        except HdovdError as error:
            if self.data is not None and self.protocol is not None:
                raise
            raise HdovdError(
                f"{error}\nThis is what set {self.features} of {self.cache} was made from. If it lies elsewhere now, "
                f"say where: --data (or --images, --annotations), --protocol"
            ) from error

    def load_for(self, cache: FeatureCache) -> tuple[Split, Protocol]:
        """`load` of the opened set. Raises HdovdError if the images are not known, not there, or not those that the set
        was made from.
        """
        from hdovd.pipelines.extraction.identities import exif_of, inputs_of

        split, protocol = self.load(
            cache.set, exif_of({level: cache.key_inputs(level) for level in cache.levels()}) or Exif.APPLY
        )
        cache.require(Level.BOXES, {"images": inputs_of(split, cache)[Level.BOXES]["images"]})
        return split, protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(CacheSource):
    """A set of features to write in a form that other programs read. `out`: a folder, or a Parquet file on this
    machine.
    """

    to: Annotated[
        ExportForm,
        Group(
            {
                "to": (
                    ExportForm,
                    MISSING,
                    Option(
                        "The form: tar shards that the webdataset package reads, a Parquet file, a LanceDB table, or a "
                        "folder of the proposals' crops and verdicts to fill in."
                    ),
                )
            },
            itemgetter("to"),
        ),
    ] = ExportForm.WEBDATASET
    out: Annotated[
        Path | str, Option("The folder to write, for webdataset also s3://, gs://; for parquet a file, FILE.parquet.")
    ]
    samples: Annotated[int, Option("Images a tar shard; it is held in memory while it is made.", min=1)] = TAR_SAMPLES

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.to is ExportForm.PARQUET and Path(self.out).suffix != ".parquet":
            raise HdovdError(f"--out {self.out}: expected a file whose name ends in .parquet")
        if self.to in (ExportForm.LANCE, ExportForm.CROPS) and "://" in str(self.out):
            raise HdovdError(f"--out {self.out}: expected a folder on this machine, for --to {self.to}")
        CacheSource.check(self)


def extraction_of(
    features: FeatureSet, cache: Path | str, name: str, give: str = DATA_AND_PROTOCOL, /, **changes: Any
) -> ExtractConfig:
    """The extraction that made the set `name`, with changes. `give`: the options that say it too. Raises HdovdError if
    it is not known.
    """
    where = f"set {name} of {cache}"
    if not features.made_from:
        raise HdovdError(f"{where} does not say what it was made from (it is damaged, or was imported): give {give}")
    try:
        return ExtractConfig.from_dict(features.made_from, cache, **changes)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise HdovdError(
            f"{where}: made_from is damaged ({error!r}): give {give}, or make it again: hdovd cache verify --repair"
        ) from error


def laid_over(given: DataPaths, known: DataPaths) -> DataPaths:
    """The paths of a data set that are given, and of the rest those that are known. A root that is given takes the
    place of all. Raises HdovdError for a form that is code outside of hdovd, which is not run because a cache names it.
    """
    if given.root is not None:
        return given
    form = known.form if given.form == AUTO else given.form
    if form != given.form and form not in FORMS:
        raise HdovdError(
            f"the data are of form {form}, code outside of hdovd, which is not run because a cache names it: if you "
            f"trust it, say so with --data {known.root} --form {form}"
        )
    return DataPaths(known.root, given.images or known.images, given.annotations or known.annotations, form)


def cache_of(run: RunFolder) -> FeatureCache:
    """The cache that a run was trained from, with the very products of then. Raises HdovdError if they are not there
    any more.
    """
    from hdovd.cache.reader import FeatureCache

    where, name, _ = set_of_run(run)
    return FeatureCache(where, name)


def data_of_cache(run: RunFolder, cache: Path | str | None = None, give: str = DATA_AND_PROTOCOL) -> DataPaths:
    """Where the data lay that the run's features were made from. `cache`: as of `set_of_run`; `give`: as of
    `extraction_of`. Raises HdovdError if that is not known.
    """
    where, name, features = set_of_run(run, cache)
    return laid_over(DataPaths(), extraction_of(features, where, name, give).data)


def set_of_run(run: RunFolder, cache: Path | str | None = None) -> tuple[str, str, FeatureSet]:
    """The cache's place, by default where it lay then, and the set with the run's keys. Raises HdovdError if there is
    none.
    """
    record = run.record()
    if "imported" in record:
        raise HdovdError("the run was imported from a checkpoint, so there is no cache that it was trained from")
    where, levels = cache or run.cache_url(), record["cache"]["levels"]
    if not where or not levels:
        raise HdovdError("the run does not say which cache it was trained from")
    if is_tar_form(where):
        raise HdovdError(
            f"it was trained from the tar shards {where}, which are read from first to last alone: this needs the Zarr "
            f"cache"
        )
    keys, sets = {level: entry["key"] for level, entry in levels.items()}, Catalog(where).sets()
    for name, features in sets.items():
        if {str(level): key for level, key in features.levels.items()} == keys:
            return str(where), name, features
    raise HdovdError(
        f"{where} has no set of features with the products that the run was trained from "
        f"({'it has ' + shorten(list(sets)) if sets else 'it has no sets'})"
    )
