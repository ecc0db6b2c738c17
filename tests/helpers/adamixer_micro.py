"""The demo's AdaMixer at micro size."""

from __future__ import annotations

from hdovd.config.recipe import Recipe, load_recipe

NAME = "demo-adamixer"
ALIKE = (  # of all query detectors
    "input.short_side=96",
    "input.long_side=128",
    "pseudo_boxes.min_side=4.0",
    "pseudo_boxes.reliability_centre=0.0",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
    "loss.instance.queue=64",
    "loss.image.queue=32",
    "inference.score_threshold=0.0",
    "train.epochs=2",
    "train.batch_size=8",
    "train.warmup_iterations=1",
    "train.workers=0",
)
SETTINGS = (
    "detector.backbone.fpn_channels=32",
    "detector.proposals.shuffle=8",
    "detector.proposals.pre_nms=60",
    "detector.decoder.queries=8",
    "detector.decoder.stages=2",
    "detector.decoder.points=4",
    "detector.decoder.out_points=8",
    "detector.decoder.feedforward=32",
    *ALIKE,
)


def recipe(*settings: str) -> Recipe:
    return load_recipe(NAME, [*SETTINGS, *settings])
