"""What `hdovd calibrate` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError
from hdovd.pipelines.common.options import Option
from hdovd.pipelines.extraction.source import CacheSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig(CacheSource):
    """A calibration. `data` and `protocol`: None for those that the set was extracted from."""

    cache: Annotated[Path | str, Option("The cache that extract-clip wrote.")]
    out: Annotated[Path, Option("The file to write; a picture of the cosines lies beside it, as .png.")] = Path(
        "calibration.toml"
    )

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.out.suffix != ".toml":  # the picture has its name, and another ending
            raise HdovdError(f"--out {self.out}: expected a name that ends in .toml")
        CacheSource.check(self)
