"""What `hdovd cache import` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, is_set_name
from hdovd.cache.schema import DEFAULT_SET
from hdovd.core.errors import HdovdError, require_files
from hdovd.data.coco import DataPaths
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.prompts import check_templates


class ForeignFormat(StrEnum):
    HD_OVD = "hd-ovd"
    OADP = "oadp"


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """What to import. `proposals`: the .pkl that goes with hd-ovd. `clip`: embeds the class names; None for no class level."""

    format: ForeignFormat
    folder: Path
    data: DataPaths
    cache: Path | str
    proposals: Path | None = None
    protocol: str = "ov-coco"
    clip: str | None = None
    pretrained: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    features: str = DEFAULT_SET
    device: str = "auto"
    precision: Precision = Precision.AUTO
    activation: Activation = Activation.AUTO

    def __post_init__(self) -> None:
        check_templates(self.templates)
        if (self.format is ForeignFormat.HD_OVD) != (self.proposals is not None):
            raise HdovdError("--format hd-ovd needs --proposals, the .pkl of boxes that its files go with; --format oadp takes none")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if not is_set_name(self.features):
            raise HdovdError(f"--features {self.features[:100]!r}: expected {SET_NAME_TOLD}")
        load_protocol(self.protocol)
        self.data.locate("train2017")
        require_files(proposals=self.proposals)
        if not self.folder.is_dir():
            raise HdovdError(f"{self.folder}: no such folder")
        Catalog.find_at(self.cache)
