"""What `hdovd cache import` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, is_set_name
from hdovd.cache.schema import DEFAULT_SET
from hdovd.core.errors import HdovdError, require_files
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.options import (
    MISSING,
    CacheWritten,
    Data,
    Device,
    Features,
    Group,
    Option,
    Pretrained,
    Protocol,
)
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES, ActivationOption, Compute
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.prompts import Templates, check_templates


class ForeignFormat(StrEnum):
    HD_OVD = "hd-ovd"
    OADP = "oadp"
    WEBDATASET = "webdataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """An import of features that others made. `clip`: embeds the class names; None for no class level."""

    format: Annotated[
        ForeignFormat,
        Option(
            "hd-ovd or oadp: embeddings that their authors published; webdataset: tar shards, which "
            "become the cache again that they were exported from; no other option is read."
        ),
    ]
    folder: Annotated[
        Path,
        Group(
            {"source": (str, MISSING, Option("The folder to import; of tar shards also s3://, gs://.", argument=True))},
            lambda given: Path(given["source"]),
        ),
    ]
    data: Data
    cache: CacheWritten
    proposals: Annotated[Path | None, Option("With hd-ovd: the .pkl of boxes that the files go with.")] = None
    protocol: Protocol = "ov-coco"
    clip: Annotated[str | None, Option("The CLIP that the publishers used: embeds the class names.")] = None
    pretrained: Pretrained = None
    templates: Templates = DEFAULT_TEMPLATES
    features: Features = DEFAULT_SET
    device: Device = "auto"
    precision: Compute = Precision.AUTO
    activation: ActivationOption = Activation.AUTO
    url: Annotated[str, Group({}, lambda given: given["source"])] = ""

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
        if not self.folder.is_dir():
            raise HdovdError(f"{self.folder}: no such folder")
        Catalog.find_at(self.cache)
