"""What `hdovd audit` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import DEFAULT_SET, Catalog, local_run
from hdovd.core import HdovdError, require_files
from hdovd.data import load_protocol
from hdovd.pipelines.common.options import DataOptions, Features, Option


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig(DataOptions):
    """An audit of a set of a cache, and of a run."""

    cache: Annotated[Path | str, Option("The cache to audit: a folder, or hf://USER/NAME, s3://, gs://.")]
    features: Features = DEFAULT_SET
    run: Annotated[Path | None, Option("A run folder: its cache, protocol and calibration are checked too.")] = None
    proposals: Annotated[
        Path | None, Option("The proposal file, where the cache does not say what made its proposals.")
    ] = None
    json_out: Annotated[Path | None, Option("Write the report as JSON too.", flags=("--json",), metavar="OUT")] = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.json_out is not None and self.json_out.is_dir():
            raise HdovdError(f"--json {self.json_out} is a folder: expected the file to write")
        load_protocol(self.protocol)
        self.data.annotation_file("train2017")
        Catalog(self.cache)
        require_files(run=None if self.run is None else local_run(self.run) / "run.json", proposals=self.proposals)
