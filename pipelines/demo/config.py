"""What `hdovd demo` is asked for. Imports no torch: a mistake shows before that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hdovd.config.recipe import load_recipe
from hdovd.pipelines.common.options import Option, require_own_folder

TRAIN_IMAGES, VAL_IMAGES = 1000, 250
WORLDS = 1000  # seeds; the teacher's pictures have others
MARKER = ".hdovd-demo"  # a folder that holds it is a demo's, and a new demo may clear it


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """A demo. `out`: everything that it writes, but the teacher."""

    out: Annotated[Path, Option("Folder for the world, the cache and the runs.")] = Path("hdovd-demo")
    seeds: Annotated[int, Option("Train both detectors with this many seeds; the table shows the spread.", min=1)] = 1
    teacher_folder: Annotated[
        Path | None, Option("Where the demo's CLIP is kept; default ~/.cache/hdovd/teachers.", flags=("--teachers",))
    ] = None
    world_seed: Annotated[int, Option("Which world to draw.", min=0, max=WORLDS - 1)] = 0
    train_images: int = TRAIN_IMAGES
    val_images: int = VAL_IMAGES
    settings: Annotated[
        tuple[str, ...], Option("Override a value of the demo recipe in every run.", flags=("--set",))
    ] = ()
    pictures: Annotated[Path | None, Option("Write small copies of three pictures here, as in the README.")] = None

    def check(self) -> None:
        """Raises HdovdError for a folder of other things, and for settings that the recipe does not know."""
        require_own_folder(self.out, MARKER, "demo")
        load_recipe("demo", self.settings)
