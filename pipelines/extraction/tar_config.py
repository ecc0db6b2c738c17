"""What `hdovd cache export` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path

from hdovd.cache.schema import DEFAULT_SET, TAR_SAMPLES
from hdovd.data.coco import DataPaths
from hdovd.pipelines.extraction.source import CacheSource


@dataclass(frozen=True, slots=True, kw_only=True)
class TarExportConfig:
    """What to export. `data` and `protocol`: None for those that the set was extracted from. `samples`: of a shard."""

    cache: Path | str
    out: Path | str
    data: DataPaths | None = None
    protocol: str | None = None
    features: str = DEFAULT_SET
    samples: int = TAR_SAMPLES

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        self.source.check()

    @property
    def source(self) -> CacheSource:
        return CacheSource(self.cache, self.features, self.data, self.protocol)
