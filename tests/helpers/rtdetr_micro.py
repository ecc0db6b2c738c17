"""The demo's RT-DETR at micro size."""

from __future__ import annotations

from adamixer_micro import ALIKE

from hdovd.config.recipe import Recipe, load_recipe

NAME = "demo-rtdetr"
SETTINGS = (
    "detector.backbone.fpn_channels=32",
    "detector.encoder.hidden=32",
    "detector.encoder.feedforward=32",
    "detector.decoder.queries=8",
    "detector.decoder.stages=2",
    "detector.decoder.feedforward=32",
    "detector.denoising.queries=4",
    *ALIKE,
)


def recipe(*settings: str) -> Recipe:
    return load_recipe(NAME, [*SETTINGS, *settings])
