"""What `hdovd push` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.cache import Catalog, is_hub
from hdovd.cache.hub import hub_client, repository
from hdovd.core import HdovdError, require_files
from hdovd.pipelines.common.options import Option
from hdovd.pipelines.runs import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class PushConfig:
    """One push of a run folder, or of a cache's."""

    source: Annotated[Path, Option("A run folder, or the folder of a cache.", argument=True, metavar="RUN|CACHE")]
    to: Annotated[
        str, Option("The repository; it is made if it is not there.", argument=True, metavar="hf://USER/NAME")
    ]
    public: Annotated[
        bool,
        Option(
            "Whether everybody may read a repository that is made. One that is there stays as it is.",
            flags=("--public/--private",),
        ),
    ] = False
    license: Annotated[
        str | None, Option("The licence that you give it, as the Hub calls it: apache-2.0. Default: none is said.")
    ] = None
    audit: Annotated[Path | None, Option("What hdovd audit --json wrote of it: the verdict goes into the card.")] = None

    @property
    def kind(self) -> str:
        return "run" if (self.source / "run.json").is_file() else "cache"

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone, and without huggingface_hub."""
        if is_hub(self.source) or repository(self.to)[1] is not None:
            raise HdovdError(f"hdovd push {self.source} {self.to}: expected a folder, and hf://USER/NAME")
        require_files(audit=self.audit)
        with hub_client(self.to):
            _ = RunFolder.open(self.source) if self.kind == "run" else Catalog(self.source)
