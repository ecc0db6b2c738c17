"""What `hdovd calibrate` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.cache.schema import DEFAULT_SET
from hdovd.core.errors import HdovdError
from hdovd.data.coco import DataPaths
from hdovd.pipelines.extraction.source import CacheSource


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """`data` and `protocol`: None for those that the set was extracted from. `out`: the TOML file; the picture lies beside it, .png."""

    cache: Path | str
    out: Path
    features: str = DEFAULT_SET
    data: DataPaths | None = None
    protocol: str | None = None

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".toml":  # the picture has its name, and another ending
            raise HdovdError(f"--out {self.out}: expected a name that ends in .toml")
        self.source.check()

    @property
    def source(self) -> CacheSource:
        return CacheSource(self.cache, self.features, self.data, self.protocol)
