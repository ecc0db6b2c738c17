"""What `hdovd demo` is asked for. Imports no torch: a mistake shows before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hdovd.config.recipe import load_recipe
from hdovd.core.errors import HdovdError

TRAIN_IMAGES, VAL_IMAGES = 1000, 250
MARKER = ".hdovd-demo"  # a folder that holds it is a demo's, and a new demo may clear it


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """`out`: everything the demo writes, but the teacher. `settings`: --set values for every training run. `pictures`: a folder for small
    copies of three pictures, as the README shows them.
    """

    out: Path
    seeds: int = 1
    teacher_folder: Path | None = None
    train_images: int = TRAIN_IMAGES
    val_images: int = VAL_IMAGES
    settings: tuple[str, ...] = ()
    pictures: Path | None = None

    def check(self) -> None:
        """Raises HdovdError for a folder of other things, and for settings that the recipe does not know."""
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARKER).is_file():
            raise HdovdError(f"{self.out} is not empty and is no demo folder: give another --out")
        load_recipe("demo", self.settings)
