"""What `hdovd serve` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import DEFAULT_SET
from hdovd.core import HdovdError
from hdovd.pipelines.common.options import ClipOptions, DataIfGiven, Features, Option, Trust
from hdovd.pipelines.extraction.source import CacheSource
from hdovd.pipelines.runs import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ClipOptions):
    """What to serve, where, and how much a browser may ask for. `data`: as of `CacheSource`; `trust`: as of
    `RunFolder.trusted`.
    """

    run: Annotated[Path | None, Option("The run that finds things in pictures, by name or by example.")] = None
    cache: Annotated[Path | str | None, Option("The cache to search by words, or by a box of a picture.")] = None
    features: Features = DEFAULT_SET
    data: DataIfGiven = None
    host: Annotated[
        str, Option("The address to listen at; 0.0.0.0: all of this machine, for anyone who reaches it.")
    ] = "127.0.0.1"
    port: Annotated[int, Option("0: one that is free.", min=0, max=65_535)] = 8765
    max_mb: Annotated[float, Option("MB that a browser may send at once.", min=0.001)] = 20.0
    max_megapixels: Annotated[float, Option("The largest picture that is decoded.", min=0.001)] = 25.0
    trust: Trust = False

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.run is None and self.cache is None:
            raise HdovdError(
                "nothing to serve: give --run RUN to find things in pictures, --cache CACHE to search, or both"
            )
        if self.run is not None:
            RunFolder.open(self.run, trusted=self.trust).recipe()
        if self.cache is not None:
            CacheSource(self.cache, self.features, self.data).check()
