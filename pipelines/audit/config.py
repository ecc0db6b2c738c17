"""What `hdovd audit` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.cache.catalog import Catalog
from hdovd.cache.schema import DEFAULT_SET
from hdovd.core.errors import HdovdError, require_files
from hdovd.data.coco import DataPaths
from hdovd.data.protocol import load_protocol


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """`features`: the set of the cache. `run`: a folder of hdovd train. `proposals`: the file that the cache was made from, where its
    set does not say what made them. `json_out`: where to write the report as JSON too."""

    data: DataPaths
    cache: Path | str
    protocol: str = "ov-coco"
    features: str = DEFAULT_SET
    run: Path | None = None
    proposals: Path | None = None
    json_out: Path | None = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.json_out is not None and self.json_out.is_dir():
            raise HdovdError(f"--json {self.json_out} is a folder: expected the file to write")
        load_protocol(self.protocol)
        self.data.annotation_file("train2017")
        Catalog(self.cache)
        require_files(run=None if self.run is None else self.run / "run.json", proposals=self.proposals)
