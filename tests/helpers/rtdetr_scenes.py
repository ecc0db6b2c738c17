"""A small RT-DETR. Pictures and boxes are those of `adamixer_scenes`."""

import torch
from adamixer_scenes import DIM, unit

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.modeling.rtdetr.model import DENOISING, RTDETR, SELECTION

OWN = {*SELECTION, *DENOISING}  # losses that no other detector has
FIRST = SELECTION[0]  # the one that pseudo boxes teach in all epochs
WIDE = ()  # for a picture of one cell
WITHOUT_BOXES = {SELECTION[0]}  # those that are not zero where no picture has a box
SMALL = (
    "input.short_side=96",
    "input.long_side=128",
    "detector.backbone.fpn_channels=32",
    "detector.encoder.hidden=32",
    "detector.encoder.feedforward=48",
    "detector.decoder.queries=8",
    "detector.decoder.stages=2",
    "detector.decoder.points=3",
    "detector.decoder.feedforward=48",
    "detector.decoder.adapter_channels=32",
    "detector.denoising.queries=6",
    "loss.instance.queue=2048",
    "loss.image.queue=512",
    "pseudo_boxes.min_side=32.0",
    "pseudo_boxes.max_per_image=5",
    "pseudo_boxes.from_epoch=2",
    "pseudo_boxes.reliability_centre=0.31",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
    "train.precision=fp32",
    "inference.score_threshold=0.005",
)


def small(*settings: str) -> Recipe:
    return load_recipe("demo-rtdetr", [*SMALL, *settings])


def detector(*settings: str, initialise: bool = True) -> RTDETR:
    """With the demo's backbone; not trained, but no weight is zero."""
    torch.manual_seed(0)
    model = RTDETR(small(*settings), DIM, initialise)
    with torch.no_grad():
        for branch in (model.network.selection.deltas, *(stage.deltas for stage in model.network.stages)):
            branch[-1].weight.normal_(std=0.05)
        for stage in model.network.stages:
            stage.sampling.offsets.weight.normal_(std=0.05)
            stage.sampling.weights.weight.normal_(std=0.05)
            stage.objectness[0].bias.zero_()
        model.adapters.transfer[-1].weight.normal_(std=0.02)
    model.set_object_text(unit(DIM, seed=5))
    return model
