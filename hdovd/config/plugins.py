"""What of a recipe is code outside of hdovd. Importing a module runs it, so a recipe is to be trusted like code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdovd.config.backbone import BACKBONES, LIBRARIES
from hdovd.config.detector import DETECTORS

if TYPE_CHECKING:
    from hdovd.config.recipe import Recipe


def outside_code(recipe: Recipe) -> dict[str, str]:
    """What a recipe names that is not part of hdovd and runs when its detector is built: values by dotted key."""
    detector, body = recipe.detector.name, recipe.detector.backbone.name
    named = {} if detector in DETECTORS else {"detector.name": detector}
    library, _, model = body.partition(":")
    if body not in BACKBONES and (library not in LIBRARIES or ":" in model):  # timm:hf-hub:... is fetched
        named["detector.backbone.name"] = body
    return named | {f"loss.extra.{name}.use": extra.use for name, extra in recipe.loss.extra.items()}
