"""The [detector] sections of a recipe with `name = "rtdetr"`.

Defaults are those of RT-DETR's paper (arXiv 2304.08069, "paper" below), of its authors' configuration for ResNet-50
("config"), and for what only HD-OVD has those of `queries`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hdovd.config.backbone import Count, NonNegative, Section, Share
from hdovd.config.queries import GROUPS_OF_NORM, QueryDecoderConfig, QueryDetectorConfig, StageLossConfig


class HybridEncoderConfig(Section):
    """One layer of attention on the coarsest level, and a fusion of levels by convolutions (paper, section 4.2)."""

    heads: Count = 8  # config
    feedforward: Count = 1024  # config
    blocks: Count = 3  # convolutions of a fusion; paper
    hidden: Count = 256  # channels of those; config, half of it for ResNet-18


class RTDETRDecoderConfig(QueryDecoderConfig):
    """The stages: attention between queries, and to a few points of each level (arXiv 2010.04159, section 4.1)."""

    feedforward: Count = 1024  # config
    points: Count = 4  # sampled by a head at each level; config
    grid: Annotated[int, Field(ge=0)] = 5  # side of a grid of points within the box, sampled too; here; 0: none


class DenoisingConfig(Section):
    """Boxes with noise, which the stages are to find again (arXiv 2203.03605, section 3.3). 0 queries: none."""

    queries: Annotated[int, Field(ge=0)] = 100  # near a box, an image, and as many too far from it; config
    label_noise: Share = 0.25  # of the queries that get the text of a class drawn by chance; config: half of its 0.5
    box_noise: NonNegative = 1.0  # most that a corner moves, half sides of the box; twice that for the others; config


class RTDETRLossConfig(StageLossConfig):
    """Weights of the stages' losses; those of objectness and boxes also of the choice of queries and of denoising."""

    objectness: NonNegative = 1.0  # varifocal; config
    near_iou: Share = 1.0  # none: without an NMS a second query on an object is a negative (METHOD section 12)


class RTDETRConfig(QueryDetectorConfig):
    """Levels: `backbone.levels`, all of which the encoder fuses and the stages sample from. `backbone.fpn_channels`:
    channels of the encoder and of queries.
    """

    name: Literal["rtdetr"]
    encoder: HybridEncoderConfig = HybridEncoderConfig()
    decoder: RTDETRDecoderConfig = RTDETRDecoderConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    loss: RTDETRLossConfig = RTDETRLossConfig()

    @model_validator(mode="after")
    def _fits(self) -> "RTDETRConfig":
        for channels, value, name in (
            (self.backbone.fpn_channels, GROUPS_OF_NORM, "backbone.fpn_channels: GroupNorm's groups"),
            (self.backbone.fpn_channels, self.encoder.heads, "backbone.fpn_channels: encoder.heads"),
            (self.backbone.fpn_channels, self.decoder.heads, "backbone.fpn_channels: decoder.heads"),
            (self.encoder.hidden, GROUPS_OF_NORM, "encoder.hidden: GroupNorm's groups"),
        ):
            if channels % value:
                key, _, why = name.partition(": ")
                raise ValueError(f"{key} = {channels} must be a multiple of {value} ({why})")
        return self
